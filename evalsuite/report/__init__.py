"""How records are shown. Nothing here changes a number."""
