"""What happens to workflows, and what a policy has done about their caches."""
