"""The mappers that need nothing but what the core knows: by table, by need, by load, by cost and quality."""
