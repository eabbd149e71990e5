"""Tools that start early and prompts split at their results: FTR and end to end beside what arithmetic allows."""
