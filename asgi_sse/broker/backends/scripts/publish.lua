-- Publish events, all of them or none, and return the end of the log.
--
-- Without events, the script only checks the log, and returns where it ends.
-- A log whose keys are gone begins again, empty and with a new epoch.
--
-- KEYS
--   1  {p}:meta   hash: the state of the log
--   2  {p}:log    stream: the events of all channels
--   3  {p}:last   sorted set: the last offset of each channel
--   4  {p}:w:ID   hash: the last batch of this process, for a retry without an answer
--   then for each event:
--      {p}:c:CHANNEL  stream: the events of its channel
--      {p}:k:...      string: its idempotency key, only if it has one
--
-- ARGV
--   1  the epoch to begin, if one has to begin
--   2  the epoch that this process knows
--   3  the number of the attempt: it grows with each batch, and stays the same when a batch is sent again
--   4  history: events that each channel keeps. 4 to 6 may be '' together: then the values in {p}:meta apply
--   5  channels: the number of channels to keep
--   6  age: ms for which a channel is kept after its last event, or 0 for no limit
--   7  the prefix of the channels' streams, {p}:c:
--   8  an offset that the server has had in the epoch of ARGV[2]. If the log ends before it, events were lost, and
--      the epoch of ARGV[1] begins.
--   then for each event: the payload, and '' or '+'. After a '+' follow:
--      '1' if it has a key, else '0'
--      the id from which on its channel keeps everything, for an event of a run, else ''
--      the ms for which its channel is kept from now on, or ''
--      the key of the run that it ends, {p}:r:RUN, or ''
--      how that run ended, or ''
--   Most events need none of this. What redis-py does with each string is most of the cost of publishing many
--   events at once, so those events send two strings.
--
-- Returns {epoch, last offset, time in ms, start offset of the epoch, ids}
--   ids are joined by spaces. They are 'stale' if a later attempt of this process has been here already.

local meta, log, last, batch = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local new_epoch, known_epoch, attempt, prefix, known_offset = ARGV[1], ARGV[2], ARGV[3], ARGV[7], ARGV[8]
local found = redis.call('HMGET', meta, 'epoch', 'n', 'history', 'channels', 'age', 'start', 'root')
local epoch, n, start, root = found[1], tonumber(found[2] or 0), found[6] or '0', found[7] or found[1]

-- Begin a log or an epoch.
local lost = not epoch or (n > 0 and redis.call('EXISTS', last) == 0 and n > tonumber(start))
if lost then
  redis.call('DEL', meta, log, last)
  epoch, n, start, root = new_epoch, 0, '0', new_epoch
  redis.call('HSET', meta, 'epoch', epoch, 'n', 0, 'start', 0, 'floor', 0, 'root', root)
elseif known_epoch == epoch and n < tonumber(known_offset) then
  epoch, start = new_epoch, string.format('%d', n)
  redis.call('HSET', meta, 'epoch', epoch, 'start', start)
end

-- Store the limits, for publishers that have none.
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
local has_events = KEYS[k] ~= nil

-- Answer a batch that was sent again, because its answer was lost.
if has_events then
  local before = redis.call('HMGET', batch, 'attempt', 'ids')
  if before[1] then
    if tonumber(before[1]) > tonumber(attempt) then return {epoch, string.format('%d', n), ms, start, 'stale'} end
    if before[1] == attempt then return {epoch, string.format('%d', n), ms, start, before[2]} end
  end
end

while KEYS[k] do
  local stream, payload, more = KEYS[k], ARGV[a], ARGV[a + 1]
  local channel = string.sub(stream, #prefix + 1)
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
    n = redis.call('HINCRBY', meta, 'n', 1)  -- the first write: a full server refuses it, and then has nothing
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
    local suffix = string.format('-%d', n)
    ids[#ids + 1] = epoch .. suffix
    -- With the root instead of the epoch: later epochs of the same offsets accept the key too.
    if key then redis.call('SET', key, root .. suffix, 'PX', 120000) end
  end
end

-- Forget the channels that were published to least recently.
local over = has_events and redis.call('ZCARD', last) - channels or 0
if over > 0 then
  local oldest = redis.call('ZPOPMIN', last, over)
  for i = 1, #oldest, 2 do redis.call('DEL', prefix .. oldest[i]) end
  redis.call('HSET', meta, 'floor', oldest[#oldest])
end

local joined = table.concat(ids, ' ')
if has_events then
  redis.call('HSET', batch, 'attempt', attempt, 'ids', joined)
  redis.call('PEXPIRE', batch, 600000)
end
return {epoch, string.format('%d', n), ms, start, joined}
