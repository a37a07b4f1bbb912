"""`python -m ssn_jax COMMAND ...` is `ssn-jax COMMAND ...`."""

from ssn_jax import cli

if __name__ == '__main__':
    cli.main()
