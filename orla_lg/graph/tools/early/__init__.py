"""Tools that start while the model still decodes: begun, handed over at their turn, or dropped."""
