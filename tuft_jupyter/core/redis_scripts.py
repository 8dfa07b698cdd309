"""What the Redis journal runs inside Redis: Lua scripts, each of which happens whole or not at all.

ARGV[1] is the namespace in all of them. They answer a list: ``OK`` with what was asked, ``HELD`` or ``FENCED`` with the
holder, ``VANISHED`` if the journal that was opened is not there any more, or ``BEHIND`` with the last record if Redis
came back with less than it had acknowledged.
"""

from __future__ import annotations

_KEYS = """
local ns = ARGV[1]
local meta, records = ns .. '::journal::meta', ns .. '::journal::records'
local image, ops, lease = ns .. '::journal::image', ns .. '::journal::ops', ns .. '::lease::journal'
"""

_MINE = (
    _KEYS
    + """
if redis.call('HGET', meta, 'id') ~= ARGV[2] then return {'VANISHED'} end
if redis.call('HGET', meta, 'epoch') ~= ARGV[3] then return {'FENCED', redis.call('GET', lease) or ''} end
"""
)

ACQUIRE = (
    _KEYS
    + """
local token, ms, known, fresh = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local holder, id = redis.call('GET', lease), redis.call('HGET', meta, 'id')
if known ~= '' and id ~= known then return {'VANISHED'} end
if holder and holder ~= token then return {'HELD', holder} end
if not id then
  redis.call('HSET', meta, 'id', fresh, 'epoch', '0', 'n', '0', 'format', '1')
  id = fresh
end
redis.call('SET', lease, token, 'PX', ms)
local epoch = redis.call('HINCRBY', meta, 'epoch', 1)
return {'OK', epoch, id, redis.call('HGET', meta, 'n')}
"""
)
"""token, milliseconds, id that is expected ('' for none), id for a new journal -> epoch, id, n"""

RENEW = (
    _MINE
    + """
local token, ms, n = ARGV[4], ARGV[5], tonumber(ARGV[6])
redis.call('SET', lease, token, 'PX', ms)
if n < 0 then return {'OK', ARGV[3]} end
local last = tonumber(redis.call('HGET', meta, 'n'))
if last < n then return {'BEHIND', last} end
for late = n + 1, last do
  redis.call('XDEL', records, late .. '-0')
  redis.call('UNLINK', ns .. '::op::' .. late, ns .. '::future::' .. late)
  redis.call('ZREM', ops, late)
end
if redis.call('EXISTS', records) == 1 then redis.call('XSETID', records, n .. '-0') end
redis.call('HSET', meta, 'n', n)
return {'OK', redis.call('HINCRBY', meta, 'epoch', 1)}
"""
)
"""id, epoch, token, milliseconds, n -> epoch. With n >= 0 the records behind n are undone and the epoch rises."""

RELEASE = (
    _KEYS
    + """
if redis.call('GET', lease) == ARGV[2] then redis.call('DEL', lease) end
return {'OK'}
"""
)
"""token"""

APPEND = (
    _MINE
    + """
local n, ttl = tonumber(ARGV[4]), ARGV[5]
if redis.call('HGET', meta, 'n') ~= ARGV[4] then return {'BEHIND', redis.call('HGET', meta, 'n')} end
for at = 6, #ARGV, 6 do
  n = n + 1
  local kind, tenant, time, data, kept = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  redis.call('XADD', records, n .. '-0', 'kind', kind, 'tenant', tenant, 'time', time, 'data', data)
  if kept ~= '' then
    local head = '{"kind":' .. cjson.encode(kind) .. ',"tenant":' .. cjson.encode(tenant)
      .. ',"time":' .. time .. ',"data":' .. data .. '}'
    local key = ns .. '::' .. kept .. '::' .. n
    redis.call('SET', key, head .. '\\n' .. ARGV[at + 5])
    if kept == 'op' then redis.call('ZADD', ops, n, n)
    elseif ttl ~= '-1' then redis.call('EXPIRE', key, ttl) end
  end
end
redis.call('HSET', meta, 'n', n)
return {'OK'}
"""
)
"""id, epoch, n so far, ttl of results, then for each record: kind, tenant, time, data, where its blob goes, blob"""

COMPACT = (
    _MINE
    + """
local n = ARGV[4]
local keep = {}
for at = 6, #ARGV do keep[ARGV[at]] = true end
redis.call('SET', image, ARGV[5])
redis.call('XTRIM', records, 'MINID', (tonumber(n) + 1) .. '-0')
for _, number in ipairs(redis.call('ZRANGEBYSCORE', ops, '-inf', n)) do
  if not keep[number] then
    redis.call('UNLINK', ns .. '::op::' .. number)
    redis.call('ZREM', ops, number)
  end
end
return {'OK'}
"""
)
"""id, epoch, n, image, numbers to keep"""

DROP = (
    _MINE
    + """
for at = 4, #ARGV do
  redis.call('UNLINK', ns .. '::op::' .. ARGV[at], ns .. '::future::' .. ARGV[at])
  redis.call('ZREM', ops, ARGV[at])
end
return {'OK'}
"""
)
"""id, epoch, numbers of the blobs to forget"""
