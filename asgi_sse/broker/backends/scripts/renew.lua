-- Renew the lease of a run, unless another process holds it.
--
-- A lease that is missing or of an earlier epoch is written again. So is one of an earlier run of this name: that run
-- has ended in an earlier epoch, or began before this one. It came back with a server that has lost events.
--
-- KEYS
--   1  {p}:r:RUN  hash: the lease
--
-- ARGV
--   1  the id of this process
--   2  ms after which the lease expires, unless it is renewed again
--   3  the epoch of the lease
--   4  the start offset of the lease
--   5 and following: the fields and values to write, without the holder
--
-- Returns 1 if this process holds the lease, 0 if another one does

local known = redis.call('HMGET', KEYS[1], 'holder', 'epoch', 'outcome', 'start')
local holder, other_epoch = known[1], known[2] ~= ARGV[3]
local earlier_run = holder and known[3] ~= '' and (other_epoch or tonumber(known[4]) < tonumber(ARGV[4]))
if holder and holder ~= ARGV[1] and not earlier_run then return 0 end
if not holder or other_epoch or earlier_run then
  redis.call('HSET', KEYS[1], 'holder', ARGV[1], unpack(ARGV, 5))
end
if redis.call('HGET', KEYS[1], 'outcome') == '' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
