"""Tree search: the loop, the tree, selection, backup and the methods."""
