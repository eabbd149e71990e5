"""What a Redis runs for a store, each script by itself and whole; it knows a script by its hash once it has run.

Each gives its clock back, in milliseconds. One that writes is refused behind its deadline (``redis_line``).

A server whose memory is full refuses commands that may take more of it, unless their script has written before. So
what takes none, or next to none, begins with a command that is not refused: a lease is renewed, a value deleted, or
replaced by one that is about as long.
"""

from __future__ import annotations

from hashlib import sha1
from typing import NamedTuple

CLOCK = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""

# KEYS: values, names, version, the lease of the fence. ARGV: the deadline, key, value, whether there is one, the
# version that is expected or -1, the epoch of the fence or -1, the channel.
PUT = (
    CLOCK
    + """
if now > tonumber(ARGV[1]) then return {'late', now} end
local epoch = tonumber(redis.call('HGET', KEYS[4], 'epoch') or 0)
if ARGV[6] ~= '-1' and epoch ~= tonumber(ARGV[6]) then return {'fence', now, epoch} end
local known = redis.call('HGET', KEYS[1], ARGV[2])
local found = known and tonumber(string.match(known, '^%d+')) or 0
if ARGV[5] ~= '-1' and found ~= tonumber(ARGV[5]) then return {'version', now, found} end
if ARGV[4] == '0' and not known then return {'done', now, tonumber(redis.call('GET', KEYS[3]) or 0)} end
if ARGV[4] == '0' then
  redis.call('HDEL', KEYS[1], ARGV[2])
  redis.call('ZREM', KEYS[2], ARGV[2])
elseif known and #ARGV[3] <= #known + 256 then
  redis.call('PERSIST', KEYS[3])
end
local version = redis.call('INCR', KEYS[3])
if ARGV[4] ~= '0' then
  redis.call('HSET', KEYS[1], ARGV[2], string.format('%.0f ', version) .. ARGV[3])
  if not known then redis.call('ZADD', KEYS[2], 0, ARGV[2]) end
end
redis.call('PUBLISH', ARGV[7], string.format('%.0f ', version) .. ARGV[2])
return {'done', now, version}
"""
)

# KEYS: values, names, version, born. ARGV: the bounds, and how many at most. Two texts, the sizes of all names and
# values and what they are, since redis-py takes a while for each part of an answer.
SCAN = """
local names = redis.call('ZRANGEBYLEX', KEYS[2], ARGV[1], ARGV[2], 'LIMIT', 0, tonumber(ARGV[3]))
local sizes, content = {}, {}
for begins = 1, #names, 500 do
  local ends = math.min(begins + 499, #names)
  local values = redis.call('HMGET', KEYS[1], unpack(names, begins, ends))
  for at = begins, ends do
    local value = values[at - begins + 1]
    sizes[2 * at - 1], sizes[2 * at] = #names[at], #value
    content[2 * at - 1], content[2 * at] = names[at], value
  end
end
local born, version = redis.call('GET', KEYS[4]) or '', redis.call('GET', KEYS[3]) or '0'
return {born, version, table.concat(sizes, ' '), table.concat(content)}
"""

# KEYS: the lease. ARGV: the deadline, holder, milliseconds, the epoch that the holder has still or 0, the epoch
# behind which one begins that nothing is known of, or -1 for the clock: then what ended a day ago can be forgotten,
# as the clock is ahead of its epoch.
LEASE = (
    CLOCK
    + """
if now > tonumber(ARGV[1]) then return {'late', now} end
local known = redis.call('HMGET', KEYS[1], 'holder', 'epoch', 'until')
local epoch = tonumber(known[2] or 0)
if not known[1] then
  epoch = tonumber(ARGV[4])
  if epoch == 0 then epoch = (ARGV[5] == '-1' and now or tonumber(ARGV[5])) + 1 end
elseif known[1] ~= ARGV[2] then
  if tonumber(known[3]) > now then return {'held', now} end
  epoch = epoch + 1
end
if known[1] then redis.call('PERSIST', KEYS[1]) end
local ends = string.format('%.0f', now + tonumber(ARGV[3]))
redis.call('HSET', KEYS[1], 'holder', ARGV[2], 'epoch', string.format('%.0f', epoch), 'until', ends)
if ARGV[5] == '-1' then redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[3]) + 86400000) end
return {'done', now, string.format('%.0f', epoch), ends}
"""
)


class Script(NamedTuple):
    """A script, and the hash that the server knows it by once it has run."""

    text: str
    sha1: str

    @classmethod
    def of(cls, text: str) -> Script:
        """Return a script."""
        return cls(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


SCRIPTS = {name: Script.of(text) for name, text in (("put", PUT), ("scan", SCAN), ("lease", LEASE))}
