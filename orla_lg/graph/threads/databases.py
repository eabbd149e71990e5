"""Leases in the saver's own database, and savers whose writes compare the owner in their own transaction.

LangGraph's savers for SQLite and PostgreSQL write through a cursor that they ask themselves for. A *fenced* saver is
a shallow copy of one, on the same connection and lock, whose cursor first looks which run owns the thread, in the
transaction of the write: a lease is taken either before, and the write is refused, or after, and its taker reads what
was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from typing import Any

from orla_lg.core.steps import Step, Steps
from orla_lg.graph.threads.steps import BlockingCall, LoopCall
from orla_lg.graph.threads.tables import LeaseTable, PostgresTable, SqliteTable, Statements
from orla_lg.link.thread_leases import ThreadOwner

LOCKED_S = 5
"""A take of a thread waits so long for a write to it: one of a process that was frozen in it may last."""


def database_registry(saver: Any) -> DatabaseRegistry | None:
    """Return the registry in the database of *saver*; ``None`` where it has none that is known."""
    for module, name, registry in _KNOWN:
        kind = getattr(sys.modules.get(module), name, None)  # a saver of it is made by that module
        if kind is not None and isinstance(saver, kind):
            return registry(saver)
    return None


class DatabaseRegistry:
    """Leases in the database of a saver.

    Args:
        saver: Whose database it is.
        table: The statements.
    """

    compares = True

    def __init__(self, saver: Any, table: LeaseTable) -> None:
        self._saver, self._table = saver, table
        self._made = False

    def forked(self) -> None:  # noqa: D102
        ...

    def take(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Steps:  # noqa: D102
        yield from self._make()
        return (yield self._transact(self._table.take(thread, owner, ttl_s, gone)))

    def renew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Steps:  # noqa: D102
        return (yield self._transact(self._table.renew(thread, owner, ttl_s)))

    def give_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> Steps:  # noqa: D102
        yield self._transact(self._table.give_back(thread, owner))

    def fenced(self, inner: Any, thread: str, holder: str) -> Steps:  # noqa: D102
        yield from self._make()  # outside any run the table may be missing
        made = copy.copy(inner)
        self._fence(made, inner, lambda: self._table.check(thread, holder))
        return made

    def _make(self) -> Steps:
        if not self._made:
            yield self._transact(self._table.make())
            self._made = True

    def _transact(self, statements: Statements) -> Step:
        return BlockingCall(partial(self._carry_out, statements))

    def _carry_out(self, statements: Statements) -> Any:
        """Carry statements out in a transaction of their own, and return what they found."""
        raise NotImplementedError

    def _fence(self, made: Any, inner: Any, check: Callable[[], Statements]) -> None:
        raise NotImplementedError


class SqliteRegistry(DatabaseRegistry):
    """Leases in the file of a ``SqliteSaver``."""

    def __init__(self, saver: Any) -> None:
        super().__init__(saver, SqliteTable())

    def _carry_out(self, statements: Statements) -> Any:
        with self._saver.cursor() as cursor:
            _begin(cursor)
            return _carried(statements, cursor)

    def _fence(self, made: Any, inner: Any, check: Callable[[], Statements]) -> None:
        @contextlib.contextmanager
        def cursor(transaction: bool = True) -> Iterator[Any]:
            with inner.cursor(transaction) as found:
                if transaction:
                    _begin(found)
                    _carried(check(), found)
                yield found

        made.cursor = cursor


class PostgresRegistry(DatabaseRegistry):
    """Leases in the database of a ``PostgresSaver``."""

    def __init__(self, saver: Any) -> None:
        super().__init__(saver, PostgresTable())

    def _carry_out(self, statements: Statements) -> Any:
        with self._saver._cursor() as cursor:
            if self._saver.pipe:
                self._saver.pipe.sync()
            with cursor.connection.transaction():
                cursor.execute(f"SET LOCAL lock_timeout = '{LOCKED_S}s'")
                return _carried(statements, cursor)

    def _fence(self, made: Any, inner: Any, check: Callable[[], Statements]) -> None:
        @contextlib.contextmanager
        def cursor(*, pipeline: bool = False) -> Iterator[Any]:
            with inner._cursor(pipeline=pipeline) as found:
                if pipeline:
                    _carried(check(), found)
                yield found

        made._cursor = cursor


class AwaitedDatabaseRegistry(DatabaseRegistry):
    """Leases in the database of a saver that is awaited, on the loop that it was made on.

    Args:
        saver: Whose database it is.
        table: The statements.
    """

    def __init__(self, saver: Any, table: LeaseTable) -> None:
        super().__init__(saver, table)
        self._loop: asyncio.AbstractEventLoop = saver.loop

    def _transact(self, statements: Statements) -> Step:
        return LoopCall(partial(self._carry_out, statements), self._loop)


class AsyncSqliteRegistry(AwaitedDatabaseRegistry):
    """Leases in the file of an ``AsyncSqliteSaver``."""

    def __init__(self, saver: Any) -> None:
        super().__init__(saver, SqliteTable())

    async def _carry_out(self, statements: Statements) -> Any:
        saver = self._saver
        await saver.setup()
        async with saver.lock, saver.conn.cursor() as cursor:
            try:
                await _abegin(saver.conn, cursor)
                return await _acarried(statements, cursor)
            finally:
                await saver.conn.commit()

    def _fence(self, made: Any, inner: Any, check: Callable[[], Statements]) -> None:
        made.setup = inner.setup  # which notes at *inner* that it is done
        made.conn = _FencedConnection(inner.conn, check)


class AsyncPostgresRegistry(AwaitedDatabaseRegistry):
    """Leases in the database of an ``AsyncPostgresSaver``."""

    def __init__(self, saver: Any) -> None:
        super().__init__(saver, PostgresTable())

    async def _carry_out(self, statements: Statements) -> Any:
        async with self._saver._cursor() as cursor:
            if self._saver.pipe:
                await self._saver.pipe.sync()
            async with cursor.connection.transaction():
                await cursor.execute(f"SET LOCAL lock_timeout = '{LOCKED_S}s'")
                return await _acarried(statements, cursor)

    def _fence(self, made: Any, inner: Any, check: Callable[[], Statements]) -> None:
        @contextlib.asynccontextmanager
        async def cursor(*, pipeline: bool = False) -> AsyncIterator[Any]:
            async with inner._cursor(pipeline=pipeline) as found:
                if pipeline:
                    await _acarried(check(), found)
                yield found

        made._cursor = cursor


class _FencedConnection:
    """A connection of aiosqlite whose cursors first look which run owns the thread; the saver holds its lock."""

    def __init__(self, connection: Any, check: Callable[[], Statements]) -> None:
        self._connection, self._check = connection, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    @contextlib.asynccontextmanager
    async def cursor(self) -> AsyncIterator[Any]:
        async with self._connection.cursor() as cursor:
            try:
                await _abegin(self._connection, cursor)
                await _acarried(self._check(), cursor)
                yield cursor
            except BaseException:  # also of a write that was cancelled: the file's lock would stay
                await self._connection.rollback()
                raise

    @contextlib.asynccontextmanager
    async def execute(self, sql: str, parameters: Any = ()) -> AsyncIterator[Any]:
        async with self.cursor() as cursor:
            await cursor.execute(sql, parameters)
            yield cursor


# SQLite takes its lock for writing at the first write; what is read before must be read under it.


def _begin(cursor: Any) -> None:
    if not cursor.connection.in_transaction:
        cursor.execute("BEGIN IMMEDIATE")


async def _abegin(connection: Any, cursor: Any) -> None:
    if not connection.in_transaction:
        await cursor.execute("BEGIN IMMEDIATE")


def _carried(statements: Statements, cursor: Any) -> Any:
    """Carry statements out, and return what they found."""
    try:
        statement = next(statements)
        while True:
            cursor.execute(*statement)
            statement = statements.send(list(map(_row, cursor.fetchall())) if _answers(statement[0]) else [])
    except StopIteration as end:
        return end.value


async def _acarried(statements: Statements, cursor: Any) -> Any:
    try:
        statement = next(statements)
        while True:
            await cursor.execute(*statement)
            rows = await cursor.fetchall() if _answers(statement[0]) else []
            statement = statements.send(list(map(_row, rows)))
    except StopIteration as end:
        return end.value


def _answers(sql: str) -> bool:
    """Whether a statement gives rows; in a pipeline a cursor does not know that before they are fetched."""
    return sql.startswith("SELECT") or " RETURNING " in sql


def _row(row: Any) -> Any:
    return tuple(row.values()) if isinstance(row, Mapping) else tuple(row)


_KNOWN: tuple[tuple[str, str, Callable[[Any], DatabaseRegistry]], ...] = (
    ("langgraph.checkpoint.sqlite", "SqliteSaver", SqliteRegistry),
    ("langgraph.checkpoint.sqlite.aio", "AsyncSqliteSaver", AsyncSqliteRegistry),
    ("langgraph.checkpoint.postgres", "PostgresSaver", PostgresRegistry),
    ("langgraph.checkpoint.postgres.aio", "AsyncPostgresSaver", AsyncPostgresRegistry),
)
"""By module and class, which savers have a database whose writes can compare."""
