"""Access policies and data labels: which calls may go where."""
