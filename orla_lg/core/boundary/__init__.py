"""What comes in from users and peers is checked and bounded, what goes out is masked and escaped."""
