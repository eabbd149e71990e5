"""The simulated engine: a discrete-event model of continuous batching."""
