"""The control routes of the second Orla daemon."""
