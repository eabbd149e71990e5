"""What runs, stages and tenants may use, and what they did."""
