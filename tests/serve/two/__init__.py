"""Two cores on a store that loses answers, and replicas: real ones in virtual time, and what may happen to them.

``cores`` has all of it (``TwoCores``), ``core`` and ``replica`` a process of each kind, ``call`` a call of a replica,
``store`` the way from a core to the store, ``wire`` a connection, ``times`` how long everything takes. Only the
engine, the network and the callers are models.
"""
