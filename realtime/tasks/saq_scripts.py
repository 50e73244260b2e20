"""The steps on SAQ's keys that Redis does as one.

`queued` and `active` are SAQ's lists of jobs that wait and that are held, `incomplete` its set of both. `beats` tells
when a job was last said to live, in milliseconds by the clock of Redis, and `swept` when lost ones were last sought.
"""

SUBMIT = """
local job, incomplete, queued = unpack(KEYS)
local ttl = ARGV[2]
if redis.call('EXPIRE', job, ttl) == 0 then
    redis.call('SET', job, ARGV[1], 'EX', ttl)
    redis.call('ZADD', incomplete, 0, job)
    redis.call('RPUSH', queued, job)
end
redis.call('EXPIRE', incomplete, ttl)
redis.call('EXPIRE', queued, ttl)
"""

HAND_BACK = """
local job, queued, active, beats = unpack(KEYS)
redis.call('ZREM', beats, job)
if redis.call('LREM', active, 1, job) == 1 then
    redis.call('LPUSH', queued, job)
    redis.call('EXPIRE', queued, ARGV[1])
end
"""

TEND = """
local beats, swept, queued, active, incomplete = unpack(KEYS)
local lease, ttl = tonumber(ARGV[1]), ARGV[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lost = 0
for at = 3, #ARGV do -- jobs that the caller holds
    if redis.call('EXPIRE', ARGV[at], ttl) == 1 then
        redis.call('ZADD', beats, now, ARGV[at])
    end
end
local since = math.abs(now - tonumber(redis.call('GET', swept) or 0))
if since * 4 >= lease then
    for _, job in ipairs(redis.call('LRANGE', active, 0, -1)) do
        local beat = redis.call('ZSCORE', beats, job)
        if redis.call('EXISTS', job) == 0 then -- done by another, or expired
            redis.call('LREM', active, 0, job)
            redis.call('ZREM', incomplete, job)
        elseif not beat or since > lease then -- just taken, or nobody could beat: it has a lease from now on
            redis.call('ZADD', beats, now, job)
        elseif now - beat > lease then
            redis.call('LREM', active, 0, job)
            redis.call('LPUSH', queued, job)
            lost = lost + 1
        end
    end
    redis.call('ZREMRANGEBYSCORE', beats, '-inf', now - lease - 1)
    redis.call('SET', swept, now)
end
for _, key in ipairs(KEYS) do
    redis.call('EXPIRE', key, ttl)
end
return lost
"""
