"""What the back end on Redis has done by the server, all of it or nothing. Its keys: see `redis`."""

from typing import Final

# KEYS: meta, log, last, w; then for each item its channel's stream, and its idempotency key if it has one.
# ARGV: 1 an epoch to begin; 2 the epoch that is to be replaced by it, if its last number is less than 8; 3 the number
# of the attempt; 4 history, 5 channels, 6 ms for which channels are kept, or 0: or '' for what stands in meta; 7 the
# prefix of channels' streams; then for each item: its payload, and '' or '+'. Behind a '+': '1' if it has a key; '' or
# (of a run) the number behind which its channel is kept; '' or the ms for which it is kept from now on; the run's key,
# or ''; its outcome.
# Most items are plain: what redis-py does with each string is most of what publishing many at once costs.
PUBLISH: Final = """
local meta, log, last, memory = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local found = redis.call('HMGET', meta, 'epoch', 'n', 'history', 'channels', 'age', 'start', 'root')
local epoch, n, start, root = found[1], tonumber(found[2] or 0), found[6] or '0', found[7] or found[1]
local lost = not epoch or (n > 0 and redis.call('EXISTS', last) == 0 and n > tonumber(start))
if lost then
  redis.call('DEL', meta, log, last)
  epoch, n, start, root = ARGV[1], 0, '0', ARGV[1]
  redis.call('HSET', meta, 'epoch', epoch, 'n', 0, 'start', 0, 'floor', 0, 'root', root)
elseif ARGV[2] == epoch and n < tonumber(ARGV[8]) then
  epoch, start = ARGV[1], string.format('%d', n)
  redis.call('HSET', meta, 'epoch', epoch, 'start', start)
end
local history, channels, age = ARGV[4], ARGV[5], ARGV[6]
if history == '' then
  history, channels, age = found[3] or '1000', found[4] or '10000', found[5] or '0'
elseif history ~= found[3] or channels ~= found[4] or age ~= found[5] or lost then
  redis.call('HSET', meta, 'history', history, 'channels', channels, 'age', age)
end
local clock = redis.call('TIME')
local ms = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000))
local ids = {}
local k, a = 5, 9
local items = KEYS[k] ~= nil
if items then
  local before = redis.call('HMGET', memory, 'attempt', 'ids')
  if before[1] then
    if tonumber(before[1]) > tonumber(ARGV[3]) then return {epoch, string.format('%d', n), ms, start, 'stale'} end
    if before[1] == ARGV[3] then return {epoch, string.format('%d', n), ms, start, before[2]} end
  end
end
while KEYS[k] do
  local stream, payload, more = KEYS[k], ARGV[a], ARGV[a + 1]
  local channel = string.sub(stream, #ARGV[7] + 1)
  local key, keep, ttl, run, outcome = false, '', '', '', ''
  k, a = k + 1, a + 2
  if more == '+' then
    if ARGV[a] == '1' then key, k = KEYS[k], k + 1 end
    keep, ttl, run, outcome = ARGV[a + 1], ARGV[a + 2], ARGV[a + 3], ARGV[a + 4]
    a = a + 5
  end
  local known = key and redis.call('GET', key)
  if known and string.sub(known, 1, #root + 1) == root .. '-' then
    ids[#ids + 1] = epoch .. string.sub(known, #root + 1)
  else
    n = redis.call('HINCRBY', meta, 'n', 1)  -- the first to write, so that a full server refuses all or nothing
    local before = redis.call('ZSCORE', last, channel)
    if not before then
      redis.call('DEL', stream)
      before = redis.call('HGET', meta, 'floor')
    end
    local id = string.format('%d-0', n)
    redis.call('XADD', log, 'MAXLEN', '~', math.max(1000, history), id,
      'c', channel, 'e', payload, 'l', before, 't', ms, 'x', epoch)
    if keep == '' then
      redis.call('XADD', stream, 'MAXLEN', '~', history, id, 'e', payload, 'l', before, 't', ms)
      if age ~= '0' then redis.call('PEXPIRE', stream, age) end
    else
      redis.call('XADD', stream, 'MINID', '~', keep, id, 'e', payload, 'l', before, 't', ms)
      redis.call('PERSIST', stream)
    end
    if ttl ~= '' then redis.call('PEXPIRE', stream, ttl) end
    if run ~= '' and redis.call('EXISTS', run) == 1 then
      if redis.call('HGET', run, 'epoch') ~= epoch then
        redis.call('HSET', run, 'epoch', epoch, 'start', start, 'whole', 0)
      end
      redis.call('HSET', run, 'outcome', outcome, 'final', n)
      redis.call('PEXPIRE', run, ttl)
    end
    redis.call('ZADD', last, n, channel)
    local number = string.format('-%d', n)
    ids[#ids + 1] = epoch .. number
    if key then redis.call('SET', key, root .. number, 'PX', 120000) end  -- which other epochs of these numbers know
  end
end
local over = items and redis.call('ZCARD', last) - channels or 0
if over > 0 then
  local oldest = redis.call('ZPOPMIN', last, over)
  for i = 1, #oldest, 2 do redis.call('DEL', ARGV[7] .. oldest[i]) end
  redis.call('HSET', meta, 'floor', oldest[#oldest])
end
local joined = table.concat(ids, ' ')
if items then
  redis.call('HSET', memory, 'attempt', ARGV[3], 'ids', joined)
  redis.call('PEXPIRE', memory, 600000)
end
return {epoch, string.format('%d', n), ms, start, joined}
"""

# KEYS: run, meta. ARGV: holder, max_bytes, ttl, whether to begin again one that has ended, ms, a token: who has got no
# answer finds by it that the run is its own.
CLAIM: Final = """
local outcome = redis.call('HGET', KEYS[1], 'outcome')
local own = redis.call('HGET', KEYS[1], 'token') == ARGV[6]
if outcome and (own or outcome == '' or ARGV[4] == '0') then
  return {own and 1 or 0, redis.call('HGETALL', KEYS[1])}
end
local at = redis.call('HMGET', KEYS[2], 'epoch', 'n')
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'max_bytes', ARGV[2], 'ttl', ARGV[3], 'outcome', '', 'final', 0,
  'token', ARGV[6], 'epoch', at[1] or '', 'start', at[2] or 0, 'whole', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return {1, redis.call('HGETALL', KEYS[1])}
"""

# KEYS: run. ARGV: holder, ms, the epoch, the start, and the fields of the run, to put it back if it is gone, or of an
# earlier epoch. One that has ended in that, or began before it, was called so before, and came back with an engine that
# has lost events.
RENEW: Final = """
local known = redis.call('HMGET', KEYS[1], 'holder', 'epoch', 'outcome', 'start')
local holder, other = known[1], known[2] ~= ARGV[3]
local before = holder and known[3] ~= '' and (other or tonumber(known[4]) < tonumber(ARGV[4]))
if holder and holder ~= ARGV[1] and not before then return 0 end
if not holder or other or before then
  redis.call('HSET', KEYS[1], 'holder', ARGV[1], unpack(ARGV, 5))
end
if redis.call('HGET', KEYS[1], 'outcome') == '' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""

# KEYS: run. ARGV: the token of the lease that nobody has got.
RELEASE: Final = """
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
