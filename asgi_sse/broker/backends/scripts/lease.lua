-- Acquire the lease of a run, or return the lease that exists.
--
-- KEYS
--   1  {p}:r:RUN  hash: the lease
--   2  {p}:meta   hash: the state of the log
--
-- ARGV
--   1  the id of this process, which becomes the holder
--   2  max_bytes of the lease
--   3  ttl of the lease, in seconds
--   4  '1' to replace a run that has ended, else '0'
--   5  ms after which the lease expires, unless it is renewed
--   6  the token of this call. A call whose answer was lost is made again with the same token, and recognises its
--      lease by it.
--
-- Returns {1 if the lease belongs to this call, else 0; the fields and values of the hash}

local outcome = redis.call('HGET', KEYS[1], 'outcome')
local own = redis.call('HGET', KEYS[1], 'token') == ARGV[6]
if outcome and (own or outcome == '' or ARGV[4] == '0') then
  return {own and 1 or 0, redis.call('HGETALL', KEYS[1])}
end
local log = redis.call('HMGET', KEYS[2], 'epoch', 'n')
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'max_bytes', ARGV[2], 'ttl', ARGV[3], 'outcome', '', 'final', 0,
  'token', ARGV[6], 'epoch', log[1] or '', 'start', log[2] or 0, 'whole', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return {1, redis.call('HGETALL', KEYS[1])}
