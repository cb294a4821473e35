"""Tasks with answers that can be checked: text in, text out. Torch-free."""
