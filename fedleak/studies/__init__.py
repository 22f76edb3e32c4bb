"""Studies that need no federation, behind commands of their own."""
