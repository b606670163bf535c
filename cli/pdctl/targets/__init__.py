"""Where a deployment lives, behind one protocol."""
