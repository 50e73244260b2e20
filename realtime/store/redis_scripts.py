"""The steps that Redis does as one: Lua scripts over the keys of one session, which share its hash tag, or over the
index of unfinished tasks, whose keys share another.

`KEYS[1]` is the session's `meta` hash; the names of its other keys follow from it, in the same slot of a cluster:

| key | holds |
|---|---|
| `meta` | the session as made, its time to live, deadline and size; each channel's position, negative where it ended |
| `log:CHANNEL` | a stream whose entries have the position of their last event as their id |
| `commands`, `order` | the records of the newest commands, and their order |
| `viewers` | who looks, by connection, each with its number in the order of arrival |

They all expire at one deadline, in milliseconds, which each use moves on, but not more often than every twentieth of
the session's time to live: with a thousand keys that is not free.

`KEYS[1]` of the index is a sorted set: tasks, each with the time in milliseconds when it has to be looked after. Beside
it are, in the same slot:

| key | holds |
|---|---|
| `payers` | whose a task is |
| `shares` | a sorted set of payers, each with a task of theirs behind, in the order of their bytes |
"""

from __future__ import annotations

import hashlib

from msgspec import Struct

_TIME = """
local function after(ms)
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000) + ms
end
"""

_SESSION = """
local meta = KEYS[1]
local base = string.sub(meta, 1, -5)
local topic = string.sub(base, 1, -2)

local function keys()
    local found = {meta, base .. 'commands', base .. 'order', base .. 'viewers'}
    for _, field in ipairs(redis.call('HKEYS', meta)) do
        if string.sub(field, 1, 2) == 'p:' then
            found[#found + 1] = base .. 'log:' .. string.sub(field, 3)
        end
    end
    return found
end

-- The session's deadline, moved on if that is worth it; nil if there is no such session.
local function use(keep)
    local found = redis.call('HMGET', meta, 'deadline', 'ttl')
    local deadline, ttl = tonumber(found[1]), tonumber(found[2]) or 3600000  -- version 0.2 kept none
    if not deadline then return nil end
    local later = after(math.max(ttl, keep))
    if later - deadline < ttl / 20 then return deadline end
    redis.call('HSET', meta, 'deadline', string.format('%.0f', later))
    for _, key in ipairs(keys()) do redis.call('PEXPIREAT', key, string.format('%.0f', later)) end
    return later
end

local function expire(key, deadline)
    redis.call('PEXPIREAT', key, string.format('%.0f', deadline))
end
"""


_TASKS = """
local index = KEYS[1]
local payers, shares = 'rt:{' .. index .. '}:payers', 'rt:{' .. index .. '}:shares'

-- How many of a payer's tasks are remembered. What an older version has forgotten, which knew of no payers, is not.
local function count(payer)
    local found = 0
    for _, share in ipairs(redis.call('ZRANGE', shares, '[' .. payer, '(' .. payer .. '\\255', 'BYLEX')) do
        local task = string.sub(share, #payer + 1)
        if redis.call('ZSCORE', index, task) then
            found = found + 1
        else
            redis.call('ZREM', shares, share)
            redis.call('HDEL', payers, task)
        end
    end
    return found
end

local function keep()
    for _, key in ipairs({index, payers, shares}) do redis.call('PEXPIRE', key, ARGV[1]) end
end
"""


class Script(Struct, frozen=True):
    """A script and the name by which a server that has seen it knows it."""

    text: str
    digest: str


def script(text: str) -> Script:
    """A script of this text."""
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _script(text: str) -> Script:
    return index_script(_SESSION + text)


def _tasks_script(text: str) -> Script:
    return index_script(_TASKS + text)


def index_script(text: str) -> Script:
    """A script over one key that belongs to no session. It has `after(ms)`: the time in so many milliseconds."""
    return script(_TIME + text)


CREATE = _script("""
local deadline = after(tonumber(ARGV[1]))
redis.call('HSET', meta, 'session', ARGV[2], 'size', 0, 'audience', 0, 'p:session', 0,
    'ttl', ARGV[1], 'deadline', string.format('%.0f', deadline))
expire(meta, deadline)
return 1
""")
"""ARGV: time to live, the session."""

LOAD = _script("""
local deadline = tonumber(redis.call('HGET', meta, 'deadline'))
if not deadline then return false end
return {string.format('%.0f', deadline - after(0)), redis.call('HGETALL', meta)}
""")
"""Returns the milliseconds that are left, and `meta`; nil for an unknown session."""

USE = _script("""
return use(0) and 1 or 0
""")
"""Returns whether there is such a session."""

APPEND = _script("""
local origin, keep, most, free = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4] == '1'
local command, record, kept = ARGV[5], ARGV[6], tonumber(ARGV[7])
local writes = {}
for at = 8, #ARGV, 6 do
    local position = tonumber(redis.call('HGET', meta, 'p:' .. ARGV[at]) or 0)
    writes[#writes + 1] = {channel = ARGV[at], expect = tonumber(ARGV[at + 1]), count = tonumber(ARGV[at + 2]),
        ends = ARGV[at + 3] == '1', topic = ARGV[at + 4], element = ARGV[at + 5], position = position}
end

local deadline = use(keep)
if not deadline then return {'unknown'} end
if command ~= '' and redis.call('HEXISTS', base .. 'commands', command) == 1 then return {'seen'} end
for _, write in ipairs(writes) do
    if write.position < 0 or (write.expect >= 0 and write.expect ~= write.position) then return {'conflict'} end
end
if #writes > 0 and not free and tonumber(redis.call('HGET', meta, 'size')) >= most then return {'full'} end

if command ~= '' then
    redis.call('HSET', base .. 'commands', command, record)
    redis.call('RPUSH', base .. 'order', command)
    expire(base .. 'commands', deadline)
    expire(base .. 'order', deadline)
    if redis.call('LLEN', base .. 'order') > kept then
        redis.call('HDEL', base .. 'commands', redis.call('LPOP', base .. 'order'))
    end
end
local answer = {'ok'}
for _, write in ipairs(writes) do
    local log = base .. 'log:' .. write.channel
    local first, last = write.position + 1, write.position + write.count
    redis.call('XADD', log, string.format('%.0f-0', last), 'e', write.element)
    if write.position == 0 then expire(log, deadline) end
    redis.call('HSET', meta, 'p:' .. write.channel, write.ends and -last or last)
    redis.call('HINCRBY', meta, 'size', #write.element)
    redis.call('PUBLISH', topic .. write.topic,
        table.concat({'A' .. origin, write.channel, string.format('%.0f', first), write.element}, '\0'))
    answer[#answer + 1] = first
end
return answer
""")
"""ARGV: origin, how long to keep the session at least, the most bytes, whether a full session takes it, the command's
key (or nothing), its record, how many are kept; then for each write its channel, the position that it expects (or -1),
how many positions it takes, whether it ends the channel, what its topic has after the session's, its element. Returns a
word, and after `ok` the first position of each write."""

JOIN = _script("""
local deadline = use(0)
if not deadline then return false end
if redis.call('HEXISTS', base .. 'viewers', ARGV[2]) == 1 then return 0 end
local number = redis.call('HINCRBY', meta, 'audience', 1)
redis.call('HSET', base .. 'viewers', ARGV[2], string.format('%.0f', number) .. ' ' .. ARGV[3])
expire(base .. 'viewers', deadline)
redis.call('PUBLISH', topic, 'J' .. ARGV[1] .. '\0' .. ARGV[3])
return 1
""")
"""ARGV: origin, connection, viewer. Returns whether it is new; nil for an unknown session."""

LEAVE = _script("""
if redis.call('EXISTS', meta) == 0 then return false end
local viewer = redis.call('HGET', base .. 'viewers', ARGV[2])
if not viewer then return '' end
redis.call('HDEL', base .. 'viewers', ARGV[2])
redis.call('HINCRBY', meta, 'audience', 1)
viewer = string.sub(viewer, string.find(viewer, ' ') + 1)
redis.call('PUBLISH', topic, 'L' .. ARGV[1] .. '\0' .. ARGV[3] .. '\0' .. viewer)
return viewer
""")
"""ARGV: origin, connection, floor. Returns the viewer, or nothing if there was none; nil for an unknown session."""

ERASE = _script("""
if redis.call('EXISTS', meta) == 0 then return 0 end
for _, key in ipairs(keys()) do redis.call('UNLINK', key) end
redis.call('PUBLISH', topic, 'G' .. ARGV[1])
return 1
""")
"""ARGV: origin. Returns whether there was such a session."""

TRACK = _tasks_script("""
local task, payer = ARGV[3], ARGV[4]
if payer ~= '' and redis.call('HEXISTS', payers, task) == 0 then
    if count(payer) >= tonumber(ARGV[5]) then return 0 end
    redis.call('HSET', payers, task, payer)
    redis.call('ZADD', shares, 0, payer .. task)
end
redis.call('ZADD', index, string.format('%.0f', after(tonumber(ARGV[2]))), task)
keep()
return 1
""")
"""Of the index. ARGV: its time to live, in how long the task has to be looked after, the task, its payer (or nothing),
how many others the payer may have. Returns whether it is remembered."""

UNTRACK = _tasks_script("""
for _, task in ipairs(ARGV) do
    local payer = redis.call('HGET', payers, task)
    if payer then
        redis.call('ZREM', shares, payer .. task)
        redis.call('HDEL', payers, task)
    end
    redis.call('ZREM', index, task)
end
return 1
""")
"""Of the index. ARGV: tasks."""

OVERDUE = _tasks_script("""
local found = redis.call('ZRANGEBYSCORE', index, '-inf', string.format('%.0f', after(0)), 'LIMIT', 0, ARGV[3])
local again = string.format('%.0f', after(tonumber(ARGV[2])))
for _, task in ipairs(found) do redis.call('ZADD', index, again, task) end
keep()
return found
""")
"""Of the index. ARGV: its time to live, in how long what is found has to be looked after again, how many at most.
Returns the tasks, the longest due first."""
