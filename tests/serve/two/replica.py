"""One replica as a process: a ``LinkedServing`` on a ``Link`` whose socket is in memory, and no thread of its own."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from orla_lg.link import serving
from orla_lg.link.connection import Link
from orla_lg.link.dialing import Dialed, Plain, addresses
from orla_lg.link.framing import FrameReader, LinkBroken, frame
from orla_lg.link.greeting import Greeted, _welcome
from orla_lg.link.messages import SILENT_S, flat
from orla_lg.link.serving import LinkedServing
from orla_lg.testing.virtual import StillAdapter
from tests.serve.two.call import ModelCall
from tests.serve.two.times import ENGINE_NOTICES_S, LEASE_S, LETS_GO_S, QUANTUM_S, REDIAL_S
from tests.serve.two.wire import End, Wire

if TYPE_CHECKING:
    from tests.serve.two.cores import TwoCores

ADDRESS = addresses("http://127.0.0.1:1")[0]


class ReplicaProcess:
    """One replica: the real link and all behind it; its thread's turns are taken one by one."""

    def __init__(self, machine: TwoCores, name: str) -> None:
        self.machine, self.name, self.clock = machine, name, machine.clock
        self.link = Link((ADDRESS,), None)
        self.link._thread = threading.current_thread()
        self.link.replica = name
        self.serving: LinkedServing | None = None
        self.wire: Wire | None = None
        self.highest = self.tries = 0
        """Epoch that was met."""
        self.late_until_s = self.frozen_until_s = 0.0
        self.dead = False
        self.calls = list[ModelCall]()
        self.woken, self.aborted = deque[ModelCall](), deque[ModelCall]()

    # Its link's thread

    def turn(self) -> None:
        """Do what is due now, unless it is frozen or dead."""
        if self.dead or self.clock() < self.frozen_until_s:
            return
        link = self.link
        if link._dialed is not None:
            if why := self._talk():
                link._lost(why)
                self.late_until_s = max(self.late_until_s, self.clock() + REDIAL_S / 10)
        elif self.clock() >= self.late_until_s:
            link._look()
            self._dial()
        else:
            link._look()
        while self.aborted:
            self.aborted.popleft().cut_off()
        while self.woken:
            self.woken.popleft().goes_on()

    def _talk(self) -> str:
        link, wire = self.link, self.wire
        assert wire is not None
        try:
            while link._dialed is not None and wire.readable:
                link._read(link._dialed.socket)
        except (OSError, LinkBroken) as error:
            return str(error)
        now = self.clock()
        if now - link._heard_s > SILENT_S:
            return "the core has been silent"
        if now >= link._renew_s:
            link._renew(now)
            link._look()
        return link._broken

    def _dial(self) -> None:
        """Try one of the cores, and begin with it if it welcomes this replica."""
        self.tries += 1
        self.late_until_s = self.clock() + REDIAL_S
        core, link = self.machine.cores[self.tries % 2], self.link
        if core is None or core.dead:
            return
        listener, sent_s = self.serving, self.clock()
        hello = serving.hello(link, "test") if listener is None else listener.cores.home.hello()
        wire = self.wire = Wire(core)
        core.wires.append(wire)
        core.loop.call_soon(core.accept, wire)
        wire.send(frame(flat(hello)))
        core.turn()
        reader = FrameReader()
        came = list(reader.feed(wire.recv(0)))
        try:
            welcome = _welcome(ADDRESS, came[0], hello, link.places.pool) if came else None
        except (OSError, LinkBroken):
            welcome = None
        if welcome is None:
            wire.shut()
            return
        socket = cast("Any", End(wire))
        greeted = Greeted(Dialed(socket, Plain(), ADDRESS, b""), welcome, reader, came[1:], sent_s)
        self.highest = max(self.highest, welcome.epoch)
        if listener is None:
            link.epoch = welcome.epoch
            listener = self.serving = LinkedServing(
                link, welcome, adapter_of=lambda backend: StillAdapter(), key_in=lambda name: None, version="test"
            )
            listener.clients["a"] = cast("Any", SimpleNamespace(abort=self._abort))
            link._listener = weakref.ref(listener.cores.home)
        link._joins(greeted)
        if not self.machine.heeds_epochs:
            link.epoch = self.highest = 0
        core.turn()

    def _abort(self) -> None:
        self.aborted += [call for call in self.calls if call.at_engine]

    # What may happen to it

    def drop(self, *, loses: bool) -> None:
        """Let the connection end; *loses*: with what is on its way."""
        if self.link._dialed is not None and self.wire is not None:
            self.wire.is_cut = loses
            if loses:
                self.wire.coming.clear()
            self.link._lost("the network")

    def freeze(self, seconds: float) -> None:
        """Stand still; where the engine does not tell, no longer than its lease: nothing would end its requests."""
        self.frozen_until_s = self.clock() + seconds
        if not self.machine.tells:
            over_s = self.link.confirmed_s + LEASE_S + LETS_GO_S - ENGINE_NOTICES_S - QUANTUM_S
            self.frozen_until_s = min(self.frozen_until_s, over_s)

    def die(self) -> None:
        """End without a word; its engine notices a little later."""
        self.dead = True
        self.link._hang_up()
        for call in self.calls:
            call.dies()

    def close(self) -> None:
        self.link._hang_up()
        self.dead, self.link._stopping = True, True
        if self.serving is not None:
            self.serving.close()
