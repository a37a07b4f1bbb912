"""`ssn-jax check` of this checkout."""

from ssn_jax import cli

if __name__ == '__main__':
    cli.main('check')
