-- Delete the lease of a run whose caller is gone, so that another process may run it.
--
-- KEYS
--   1  {p}:r:RUN  hash: the lease
--
-- ARGV
--   1  the token of the call that acquired the lease; a lease with another token stays
--
-- Returns nothing

if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('DEL', KEYS[1]) end
