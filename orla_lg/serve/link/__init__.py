"""The core's side of links: replicas of wrapped graphs, their calls, and what becomes of both when one is lost."""
