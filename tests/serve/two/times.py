"""How long everything takes, in virtual seconds: less than usual, so that fewer moments pass."""

from __future__ import annotations

BOUND = 2
"""So many calls may be at the engine."""
CORE_LEASE_S, LEASE_S = 1.5, 3.0
"""Of cores, and of replicas."""
LETS_GO_S = 1.0
"""``orphans.SILENT_LETS_GO_S``."""
ENGINE_NOTICES_S = 0.8 * LETS_GO_S
"""A hung-up request is gone from the engine after so long."""
QUANTUM_S, RESTART_S, REDIAL_S = 0.1, 0.3, 0.2
