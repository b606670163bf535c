"""Load generator and result schema."""
