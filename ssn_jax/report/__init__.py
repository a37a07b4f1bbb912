"""Reports: tables, figures, and the published results beside them."""
