"""Weight passes: one file each, and the file's name is the recipe's key."""
