"""What an engine is: its address and prices, what it can do, how well it is and how fast."""
