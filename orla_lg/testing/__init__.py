"""For those who extend orla_lg: the adapters' conformance suite, engines that fail on demand, virtual time."""
