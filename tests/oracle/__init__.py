"""What runs under another interpreter, where published packages are compared with us."""
