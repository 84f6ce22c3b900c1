#!lua name=reprise_claims_VERSION
-- Claims: which missing blocks a worker is computing. `claims.py` holds the callers and describes the keys; of
-- the store's books nothing is read or changed here. Times are ms.

local CLAIMER_BYTES, FOLLOWED, HEADER_BYTES = 8, 9, 21 -- claimer, followed, when it begins, when all is stored
local HEADER = '>c8BI6I6'
local ID_BYTES = 8 -- the leading bytes of each claimed block's hash, in order

local function register(name, callback, flags)
  redis.register_function{function_name = 'reprise_claims_VERSION_' .. name, callback = callback, flags = flags}
end

local function held_by(key, claimer)
  return redis.call('GETRANGE', key, 0, CLAIMER_BYTES - 1) == claimer
end

-- How many leading ids of `run` the claim's blocks from number `offset` on are: the ids are of hashes that
-- cover all before them, so where one is equal so are those before it.
local function shared(claim, offset, run)
  local function equal(n)
    local at = HEADER_BYTES + (offset + n - 1) * ID_BYTES
    return claim:sub(at + 1, at + ID_BYTES) == run:sub((n - 1) * ID_BYTES + 1, n * ID_BYTES)
  end
  local low, high = 0, math.min(#run, #claim - HEADER_BYTES - offset * ID_BYTES) / ID_BYTES
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if equal(middle) then low = middle else high = middle - 1 end
  end
  return low
end

-- keys of the claims that begin at the blocks up to the first missing one, that one last;
-- claimer, life, begins, waits, due, least, ids of the missing blocks ->
--   C  claimed    M  the claimer has claimed them before    N  another has, and it is no use to wait
--   F, blocks, ms, n, by: another computes so many of them and should have stored them in so long; its claim is
--   the n-th key
-- With blocks of a run the times grow evenly from `begins`: when the caller would compute them itself, until
-- when it rather waits, when they would be in the store then. All from now on.
register('claim', function(keys, args)
  local clock = redis.call('TIME')
  local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
  local claimer, life, run = args[1], tonumber(args[2]), args[7]
  local begins, waits, due, least = tonumber(args[3]), tonumber(args[4]), tonumber(args[5]), tonumber(args[6])
  local claims = redis.call('MGET', unpack(keys))
  for n = #keys, 1, -1 do
    local claim, offset = claims[n], #keys - n
    local blocks = claim and shared(claim, offset, run) or 0
    if blocks > 0 then
      local by, followed, other_begins, other_due = struct.unpack(HEADER, claim)
      if by == claimer then return {'M'} end
      local all = (#claim - HEADER_BYTES) / ID_BYTES
      local part = blocks * ID_BYTES / #run
      -- One that is late is expected to be so for as long again, one that is faster than it said to stay so.
      local expected = math.abs(other_begins + (other_due - other_begins) * (offset + blocks) / all - now)
      if offset > 0 and now > other_begins then
        expected = math.min(expected, (now - other_begins) / offset * blocks)
      end
      if blocks >= least and expected <= begins + (waits - begins) * part then
        if followed == 0 then redis.call('SETRANGE', keys[n], FOLLOWED - 1, '\1') end
        return {'F', blocks, math.ceil(expected), n, by}
      end
      if expected <= begins + (due - begins) * part or blocks < least then return {'N'} end
      break -- whoever comes next had better wait for the caller
    end
  end
  local header = struct.pack(HEADER, claimer, 0, now + begins, now + due)
  redis.call('SET', keys[#keys], header .. run, 'PX', life)
  return {'C'}
end, {'allow-oom'})

-- keys of claims; claimer, life -> one byte a claim: 0 it is lost, 1 it lives on, 2 and somebody follows
register('renew', function(keys, args)
  local held = {}
  for i, key in ipairs(keys) do
    held[i] = '0'
    if held_by(key, args[1]) then
      redis.call('PEXPIRE', key, args[2])
      held[i] = redis.call('GETRANGE', key, FOLLOWED - 1, FOLLOWED - 1) == '\1' and '2' or '1'
    end
  end
  return table.concat(held)
end, {'allow-oom'})

-- keys of claims; claimer
register('release', function(keys, args)
  for _, key in ipairs(keys) do
    if held_by(key, args[1]) then redis.call('DEL', key) end
  end
  return redis.status_reply('OK')
end, {'allow-oom'})
