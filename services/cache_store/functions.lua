#!lua name=reprise_store_VERSION
-- The store's metadata and every change to it. `functions.py` holds the callers and describes the keys.
--
-- One packed record a block, in the hash `blocks`. States of a record:
--   WRITING  reserved by a writer until a deadline; never found by a lookup
--   READY    its payload is in place
--   LOST     its payload is gone or was found bad while children are stored; a writer may write it again.
--            Nobody finds what follows it meanwhile, so after LOST_LIFE that is to go too: see `doomed`
-- What always holds (tests/cache_store/test_functions_model.py):
--   a record's parent is the root or has a record; `children` counts the records that name it as parent;
--   a block is in `leaves`, and in `owned`, if and only if it is READY and has no children; a LOST block has
--   children and is in `lost`; the sum of sizes is `total`, and no reservation takes it or its owner beyond
--   capacity and quota.
--
-- A use of a block is a use of every block before it. A lookup stamps all that it found; what was used without
-- those before it hands its stamp to its parent when it leaves. A lease on the deepest block protects all
-- blocks before it: none of them can be a leaf while it is stored.
--
-- What is evicted: see the eviction queue below. Ages, classes and densities are those of `worth.py`.

local WRITING, READY, LOST = 0, 1, 2
local RECORD = '>BBI6BBBHHI4I6c7c8c16'
local VALUE, LAST, REST, RETAINED = 2, 3, 9, 11 -- where parts of a packed record start
local CONDEMNED = 2 -- in the byte at RETAINED, beside the bit that it is retained
local FENCE_START, FENCE_END = 26, 32
local RETENTION, RETENTION_BYTES = '>c8BI6I6', 21
local RESERVE_BLOCK, RETAIN_BLOCK = '>c16c16c8I4BI6', '>c16BI6'
local ROOT = '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0'
local NO_FENCE = '\0\0\0\0\0\0\0'
local NEVER = 281474976710655 -- 2^48 - 1 ms
local STEP = 4398046511104 -- 2^42 ms: one group of leaves after the other, until the year 2109
local DEFAULT_PRIORITY, HIGH_PRIORITY, MAX_PRIORITY, PINNED = 35, 70, 100, 101
local FREQUENCIES, CLASSES, AGES, MAX_USES = 4, 16, 48, 15
local SUPERSEDED = 128 -- added to a retention's priority: its owner has asked for something else since
local GHOST_STEP, GHOST_BYTES = 64, 8
local GHOST_LIFE, GHOSTS_PER_BLOCK, GHOSTS_AT_LEAST = 1800000, 1, 20000
local MAX_DEATHS = 128 -- of ghosts in a call; more than a call can make
local WEIGHTS_LIFE = 600000 -- after which nobody has learned for so long that plain priorities are better
local PAUSE = 1000 -- ms until a leaf that its owner's floor protects is looked at again
local MAX_RETENTIONS = 8 -- a block; the weakest is forgotten
local MAX_VICTIMS = 64 -- a call: about 1 ms of the server's only thread
local MAX_EXAMINED = 1024 -- heads of the queue looked at in a call, protected ones included
local MAX_DUE = 64 -- overdue reservations and retentions settled by a call that is about to evict
local MAX_LEASE_MS, MAX_RESERVATION_MS = 30000, 60000
local MAX_WALK = 4096 -- records that one call reads on the way from blocks to their roots: a few ms
local MAX_PINNED = 1024 -- blocks a call
local MAX_CONDEMNED = 64 -- prefixes at once, by operators
local LOST_LIFE = 600000 -- ms; of the uses of a block 94 % follow the one before within that (Mooncake's trace)
local MAX_DOOMED = 1024 -- lost blocks that one call names
local TRACE_LENGTH, TRACE_ID_BYTES = 4096, 8

-- ---- one call's view of the store --------------------------------------------------------------------

local function open(keys)
  local clock = redis.call('TIME') -- the only clock: workers' clocks may differ
  return {
    blocks = keys[1], leaves = keys[2], writing = keys[3], retained = keys[4], expiring = keys[5],
    bytes = keys[6], config = keys[7], dropped = keys[8], counts = keys[9],
    owned = keys[10], ghosts = keys[11], events = keys[12], learned = keys[13], condemned = keys[14],
    trace = keys[15], lost = keys[16],
    now = clock[1] * 1000 + math.floor(clock[2] / 1000),
    records = {}, changed = {}, charges = {}, gone = {}, used = {}, limits = {}, happened = {},
    evicted = {}, examined = 0, victims = 0, pinned = 0, walked = 0,
  }
end

local function unpack_record(packed)
  local state, value, last, priority, held, retained, readers, children, size, lease, fence, owner, parent =
    struct.unpack(RECORD, packed)
  return {
    state = state, tier = math.floor(value / 16), uses = value % 16, last = last, priority = priority,
    held = held, retained = retained % 2, condemned = math.floor(retained / 2), readers = readers, children = children, size = size, lease = lease,
    fence = fence, owner = owner, parent = parent,
  }
end

local function fetch(store, ids)
  local packed = redis.call('HMGET', store.blocks, unpack(ids))
  for i = 1, #ids do
    if store.records[ids[i]] == nil then
      store.records[ids[i]] = packed[i] and unpack_record(packed[i]) or false
    end
  end
end

local function get(store, id)
  if store.records[id] == nil then fetch(store, {id}) end
  return store.records[id]
end

local function save(store, id, record)
  store.records[id] = record
  store.changed[id] = true
end

local function total(store)
  if not store.total then store.total = tonumber(redis.call('HGET', store.bytes, 'total') or 0) end
  return store.total
end

-- What a block counts among the pinned bytes.
local function pinned(record)
  return record.priority == PINNED and record.size or 0
end

-- Bytes of an owner.
local function used(store, owner)
  if not store.used[owner] then store.used[owner] = tonumber(redis.call('HGET', store.bytes, owner) or 0) end
  return store.used[owner]
end

-- `quota` or `floor` of an owner in bytes, nil if it has none.
local function limit_of(store, what, owner)
  local key = what .. ':' .. owner
  if store.limits[key] == nil then
    store.limits[key] = tonumber(redis.call('HGET', store.config, key)) or false
  end
  return store.limits[key] or nil
end

local function charge(store, owner, bytes)
  store.total = total(store) + bytes
  store.used[owner] = used(store, owner) + bytes
  store.charges[owner] = (store.charges[owner] or 0) + bytes
end

local function close(store)
  local put, delete = {}, {}
  for id in pairs(store.changed) do
    local r = store.records[id]
    if r then
      put[#put + 1] = id
      put[#put + 1] = struct.pack(RECORD, r.state, r.tier * 16 + r.uses, r.last, r.priority, r.held,
        r.retained + 2 * (r.condemned or 0), r.readers, r.children, r.size, r.lease, r.fence, r.owner, r.parent)
    else
      delete[#delete + 1] = id
    end
  end
  if #put > 0 then redis.call('HSET', store.blocks, unpack(put)) end
  if #delete > 0 then redis.call('HDEL', store.blocks, unpack(delete)) end
  for owner, bytes in pairs(store.charges) do
    if bytes ~= 0 then
      if redis.call('HINCRBY', store.bytes, owner, bytes) == 0 then redis.call('HDEL', store.bytes, owner) end
      redis.call('HINCRBY', store.bytes, 'total', bytes)
    end
  end
  if store.pinned ~= 0 and redis.call('HINCRBY', store.bytes, 'pinned', store.pinned) == 0 then
    redis.call('HDEL', store.bytes, 'pinned')
  end
  for event, times in pairs(store.happened) do
    redis.call('HINCRBY', store.events, event, times)
  end
end

local function count(store, what, by)
  if by > 0 then redis.call('HINCRBY', store.counts, what, by) end
end

local function count_evicted(store, reason)
  for tier, blocks in pairs(store.evicted) do count(store, 'evicted:' .. reason .. ':' .. tier, blocks) end
end

-- For the recorder, which says that it reads by keeping the stream there: without it this is one EXISTS.
local function tell_recorder(store, what, parts)
  if redis.call('EXISTS', store.trace) == 0 then return end
  redis.call('XADD', store.trace, 'NOMKSTREAM', 'MAXLEN', '~', TRACE_LENGTH, '*', what, table.concat(parts()))
end

-- ---- what is learned ---------------------------------------------------------------------------------
-- Every use of a block, and every ghost's death, is counted by class and age until the service folds the
-- counts into densities. A ghost is what stays of an evicted block: a part of its id, and in one score its
-- last use, tier and uses.

local function class_of(tier, uses)
  return tier * FREQUENCIES + math.min(uses, FREQUENCIES) - 1
end

local function age_bucket(age)
  local fraction, exponent = math.frexp(1 + math.max(0, age) / 1000)
  return math.min(AGES - 1, (exponent - 1) * 4 + math.floor(fraction * 8 - 4))
end

local function happen(store, what, tier, uses, bucket, times)
  local event = what .. string.char(class_of(tier, uses), bucket)
  store.happened[event] = (store.happened[event] or 0) + times
end

local function use(store, record)
  happen(store, 'h', record.tier, record.uses, age_bucket(store.now - record.last), 1)
  record.uses = math.min(MAX_USES, record.uses + 1)
  record.last = math.max(record.last, store.now)
end

local function read_ghost(score)
  local value = score % GHOST_STEP
  return math.floor(score / GHOST_STEP), math.floor(value / 16), value % 16
end

local function remember(store, id, record)
  local score = record.last * GHOST_STEP + record.tier * 16 + record.uses
  redis.call('ZADD', store.ghosts, score, id:sub(1, GHOST_BYTES))
end

-- Uses before its eviction of a block that comes back. With twice the memory it would still be there if fewer
-- ghosts than there are blocks were used after it, without those that this call has made.
local function remembered(store, id)
  local short = id:sub(1, GHOST_BYTES)
  local score = tonumber(redis.call('ZSCORE', store.ghosts, short))
  if not score then return 0 end
  local younger = redis.call('ZREVRANK', store.ghosts, short)
  redis.call('ZREM', store.ghosts, short)
  local last, tier, uses = read_ghost(score)
  local age = store.now - last
  if age > GHOST_LIFE then
    happen(store, 'd', tier, uses, age_bucket(age), 1)
    return 0
  end
  happen(store, 'h', tier, uses, age_bucket(age), 1)
  count(store, 'returned:' .. class_of(tier, uses), 1)
  if younger - store.victims < redis.call('HLEN', store.blocks) then count(store, 'returned_soon', 1) end
  return math.min(MAX_USES - 1, uses)
end

-- Ghosts that are too old, or too many, die: their blocks were not used again.
local function bury(store)
  local room = GHOSTS_PER_BLOCK * redis.call('HLEN', store.blocks) + GHOSTS_AT_LEAST
  local excess = math.min(redis.call('ZCARD', store.ghosts) - room, MAX_DEATHS)
  local oldest = redis.call('ZRANGE', store.ghosts, 0, 0, 'WITHSCORES')[2]
  if not oldest or excess <= 0 and store.now - read_ghost(tonumber(oldest)) <= GHOST_LIFE then return end
  local dying = redis.call('ZRANGE', store.ghosts, 0, MAX_DEATHS - 1, 'WITHSCORES')
  local buried = 0
  for i = 1, #dying / 2 do
    local last, tier, uses = read_ghost(tonumber(dying[2 * i]))
    if i > excess and store.now - last <= GHOST_LIFE then break end
    happen(store, 'd', tier, uses, age_bucket(store.now - last), 1)
    buried = i
  end
  if buried > 0 then redis.call('ZREMRANGEBYRANK', store.ghosts, 0, buried - 1) end
end

-- ---- the eviction queue ----------------------------------------------------------------------------
-- `leaves` has one queue after the other, a group's at group * STEP. A group is (effective priority, class);
-- within it the least recently used leaf is the head. The victim is the head of least density for its age. A
-- store that nobody has learned for goes by (effective priority, last use) instead. Pinned blocks are no matter
-- of worth: they stay.
--
-- A leaf that may not go yet waits in its queue until it may: then its time there is not its last use, but when
-- to look at it again. `owned` has the same order owner by owner: owner, score and id as one string.

local function owned_prefix(owner, score)
  return owner .. struct.pack('>I7', score)
end

local function took_place(store, score)
  if store.heads then store.heads[math.floor(score / STEP)] = nil end
  if store.stale then store.stale[math.floor(score / STEP)] = true end
end

local function dequeue(store, id, owner)
  local score = tonumber(redis.call('ZSCORE', store.leaves, id))
  if not score then return end
  redis.call('ZREM', store.leaves, id)
  redis.call('ZREM', store.owned, owned_prefix(owner, score) .. id)
  took_place(store, score)
end

local function enqueue(store, id, record, time)
  dequeue(store, id, record.owner)
  local group = record.priority * CLASSES + class_of(record.tier, record.uses)
  local score = group * STEP + time
  redis.call('ZADD', store.leaves, score, id)
  redis.call('ZADD', store.owned, 0, owned_prefix(record.owner, score) .. id)
  took_place(store, score)
end

local function enqueue_if_leaf(store, id, record)
  if record.state == READY and record.children == 0 then enqueue(store, id, record, record.last) end
end

local function first_leaf_from(store, score)
  local found = redis.call('ZRANGEBYSCORE', store.leaves, score, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if found[1] then return found[1], tonumber(found[2]) end
end

local function first_of_owner_from(store, owner, score)
  local from = '[' .. owned_prefix(owner, score)
  local found = redis.call('ZRANGEBYLEX', store.owned, from, '+', 'LIMIT', 0, 1)[1]
  if found and found:sub(1, 8) == owner then
    local there = struct.unpack('>I7', found, 9)
    return found:sub(16), there
  end
end

local function all_heads(from)
  local heads, score = {}, 0
  while true do
    local id, found = from(score)
    if not id then return heads end
    local group = math.floor(found / STEP)
    heads[group] = {id = id, score = found, time = found - group * STEP}
    score = (group + 1) * STEP
  end
end

-- Heads of all groups by group; looked up once a call, and then where something has changed.
local function heads_of(store)
  if not store.heads then
    store.heads, store.stale = all_heads(function(score) return first_leaf_from(store, score) end), {}
  end
  for group in pairs(store.stale) do
    local id, score = first_leaf_from(store, group * STEP)
    if id and math.floor(score / STEP) == group then
      store.heads[group] = {id = id, score = score, time = score - group * STEP}
    end
  end
  store.stale = {}
  return store.heads
end

-- Densities as doubles, or false if nobody learns any more.
local function weights_of(store)
  if store.weights == nil then
    local learned = redis.call('HMGET', store.learned, 'weights', 'at')
    store.weights = learned[1] and tonumber(learned[2]) + WEIGHTS_LIFE > store.now and learned[1] or false
  end
  return store.weights
end

-- The head to lose first among those that may go for a block of `max_priority` and need not wait beyond `time`,
-- and its worth.
local function least(store, heads, max_priority, time)
  local weights = weights_of(store)
  local best, best_worth
  for group, head in pairs(heads) do
    local priority = math.floor(group / CLASSES)
    local allowed = priority <= max_priority or weights and priority < PINNED
    if allowed and head.time <= time then
      local worth = priority
      if weights then
        local at = (group % CLASSES * AGES + age_bucket(store.now - head.time)) * 8 + 1
        worth = struct.unpack('>d', weights, at)
      end
      if not best or worth < best_worth or worth == best_worth
        and (head.time < best.time or head.time == best.time and head.id < best.id) then
        best, best_worth = head, worth
      end
    end
  end
  return best, best_worth
end

-- Takes a block's payload away, and its record too unless children hang on it; goes on to its parent if
-- that waited, LOST, for its last child.
local function remove(store, id)
  local record = get(store, id)
  if record.state == WRITING then
    redis.call('ZREM', store.writing, id)
  elseif record.state == READY and record.children == 0 then
    dequeue(store, id, record.owner)
  end
  if record.state ~= LOST then
    store.gone[#store.gone + 1] = id .. record.fence
    redis.call('SADD', store.dropped, id .. record.fence)
    charge(store, record.owner, -record.size)
    store.pinned = store.pinned - pinned(record)
  end
  if record.children > 0 then
    redis.call('ZADD', store.lost, store.now + LOST_LIFE, id)
    record.state, record.size, record.fence, record.lease, record.readers = LOST, 0, NO_FENCE, 0, 0
    return save(store, id, record)
  end
  if record.state == LOST then redis.call('ZREM', store.lost, id) end
  if record.retained == 1 then
    redis.call('HDEL', store.retained, id)
    redis.call('ZREM', store.expiring, id)
  end
  if record.condemned == 1 then redis.call('SREM', store.condemned, id) end
  save(store, id, false)
  if record.parent == ROOT then return end
  local parent = get(store, record.parent)
  if not parent then return end
  parent.children = parent.children - 1
  parent.last = math.max(parent.last, record.last)
  save(store, record.parent, parent)
  if parent.state == LOST and parent.children == 0 then return remove(store, record.parent) end
  enqueue_if_leaf(store, record.parent, parent)
end

-- Whether the leaf at a head went; else it waits until after `time`, when it may be looked at again. Its
-- owner's floor is no matter when the owner itself needs the room.
local function evict(store, head, owner, time)
  local id, record = head.id, get(store, head.id)
  if not record then -- see begin_anew_unless_books_add_up
    redis.call('ZREM', store.leaves, id)
    if owner then redis.call('ZREM', store.owned, owned_prefix(owner, head.score) .. id) end
    took_place(store, head.score)
    return false
  end
  if record.lease > store.now then
    enqueue(store, id, record, math.max(record.lease, time + 1))
    return false
  end
  local floor = record.owner ~= owner and limit_of(store, 'floor', record.owner)
  if floor and used(store, record.owner) - record.size < floor then
    enqueue(store, id, record, store.now + PAUSE)
    return false
  end
  store.victims = store.victims + 1
  store.evicted[record.tier] = (store.evicted[record.tier] or 0) + 1
  remember(store, id, record)
  remove(store, id)
  return true
end

-- Evicts the leaf that is worth least. False if none may go for a block of `max_priority` of `owner`.
local function evict_one(store, max_priority, owner)
  while store.examined < MAX_EXAMINED do
    store.examined = store.examined + 1
    local head = least(store, heads_of(store), max_priority, store.now)
    if not head then return false end
    if evict(store, head, owner, store.now) then return true end
  end
  return false
end

-- The same among the owner's own leaves, for it has reached its quota: those too that wait for its floor.
local function evict_own(store, max_priority, owner)
  while store.examined < MAX_EXAMINED do
    store.examined = store.examined + 1
    local heads = all_heads(function(score) return first_of_owner_from(store, owner, score) end)
    local head = least(store, heads, max_priority, store.now + PAUSE)
    if not head then return false end
    if evict(store, head, owner, store.now + PAUSE) then return true end
  end
  return false
end

-- ---- retention ---------------------------------------------------------------------------------------
-- A block's retentions are a set: (owner, priority) -> expiry. Its effective priority is the highest one that
-- is live; `held` says that somebody wants the default for good, which is kept as one bit because nearly
-- every block has just that. So no use by another can lower a block, and none can end its time limit.
--
-- What the value of a block is learned by is what its users ask for now: `tier`, the highest of what each owner
-- asked for last and that is live. A superseded retention counts for the priority only.

local function read_retentions(store, id, record)
  local list = {}
  if record.retained == 1 then
    local packed = redis.call('HGET', store.retained, id) or ''
    for at = 1, #packed, RETENTION_BYTES do
      local owner, priority, ttl, expires = struct.unpack(RETENTION, packed, at)
      list[#list + 1] = {
        owner = owner, priority = priority % SUPERSEDED, superseded = priority >= SUPERSEDED,
        ttl = ttl, expires = expires,
      }
    end
  end
  return list
end

local function tier_of(priority)
  if priority == DEFAULT_PRIORITY then return 1 end
  if priority < DEFAULT_PRIORITY then return 0 end
  return priority < HIGH_PRIORITY and 2 or 3
end

local function stronger(a, b)
  if a.priority ~= b.priority then return a.priority > b.priority end
  if a.expires ~= b.expires then return a.expires > b.expires end
  return a.owner < b.owner
end

-- Forgets what has expired, writes the rest back and brings the effective priority and the queue up to date.
local function settle_retentions(store, id, record, list)
  local live, pinned_before = {}, pinned(record)
  for _, entry in ipairs(list) do
    if entry.expires > store.now then live[#live + 1] = entry end
  end
  table.sort(live, stronger)
  local packed, earliest, asked = {}, NEVER, record.held == 1 and DEFAULT_PRIORITY or nil
  for i = 1, math.min(#live, MAX_RETENTIONS) do
    local entry = live[i]
    local priority = entry.priority + (entry.superseded and SUPERSEDED or 0)
    packed[i] = struct.pack(RETENTION, entry.owner, priority, entry.ttl, entry.expires)
    earliest = math.min(earliest, entry.expires)
    if not entry.superseded then asked = math.max(asked or 0, entry.priority) end
  end
  if #packed > 0 then
    redis.call('HSET', store.retained, id, table.concat(packed))
  elseif record.retained == 1 then
    redis.call('HDEL', store.retained, id)
  end
  if earliest < NEVER then
    redis.call('ZADD', store.expiring, earliest, id)
  elseif record.retained == 1 then
    redis.call('ZREM', store.expiring, id)
  end
  record.retained = #packed > 0 and 1 or 0
  record.priority = live[1] and live[1].priority or DEFAULT_PRIORITY
  if record.held == 1 then record.priority = math.max(record.priority, DEFAULT_PRIORITY) end
  store.pinned = store.pinned + pinned(record) - pinned_before
  record.tier = tier_of(asked or DEFAULT_PRIORITY)
  save(store, id, record)
  enqueue_if_leaf(store, id, record)
end

local function retain_block(store, id, record, owner, priority, ttl)
  local plain = priority == DEFAULT_PRIORITY and ttl == NEVER
  if plain and record.retained == 0 then
    if record.held == 0 then
      record.held = 1
      settle_retentions(store, id, record, {})
    end
    return
  end
  local list, entry = read_retentions(store, id, record), nil
  for _, known in ipairs(list) do
    if known.owner == owner then
      known.superseded = plain or known.priority ~= priority
      if not known.superseded and known.expires > store.now then entry = known end
    end
  end
  if plain then
    record.held = 1
  else
    if not entry then
      entry = {owner = owner, priority = priority, ttl = ttl, expires = 0}
      list[#list + 1] = entry
    end
    entry.ttl = math.max(entry.ttl, ttl)
    entry.expires = math.max(entry.expires, ttl == NEVER and NEVER or store.now + ttl)
  end
  settle_retentions(store, id, record, list)
end

-- A use by `owner` starts the time of its live retentions anew; nobody else's.
local function renew_retentions(store, id, record, owner)
  local list = read_retentions(store, id, record)
  for _, entry in ipairs(list) do
    if entry.owner == owner and entry.expires > store.now and entry.ttl < NEVER then
      entry.expires = math.max(entry.expires, store.now + entry.ttl)
    end
  end
  settle_retentions(store, id, record, list)
end

-- ---- upkeep ------------------------------------------------------------------------------------------

-- Redis may have been told to evict keys on its own, or somebody deletes one: records without a queue, or a
-- queue without records. That cannot be mended, only begun anew, and a changed identity tells the workers.
-- What the rest of this file does not find, it therefore passes over.
local function begin_anew_unless_books_add_up(store)
  local blocks = redis.call('HLEN', store.blocks)
  local ends = redis.call('ZCARD', store.leaves) + redis.call('ZCARD', store.writing)
  if (blocks == 0) == (ends == 0) and (blocks == 0) == (total(store) == 0) then return end
  redis.call('UNLINK', store.blocks, store.leaves, store.owned, store.writing, store.retained, store.expiring,
    store.bytes, store.condemned, store.lost)
  redis.call('HDEL', store.config, 'identity')
  count(store, 'begun_anew', 1)
  store.records, store.total, store.used = {}, nil, {}
end

local function reap(store, limit)
  local due = redis.call('ZRANGEBYSCORE', store.writing, '-inf', store.now, 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    if get(store, id) then remove(store, id) else redis.call('ZREM', store.writing, id) end
  end
  count(store, 'reaped', #due)
  return #due
end

local function expire(store, limit)
  local due = redis.call('ZRANGEBYSCORE', store.expiring, '-inf', store.now, 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    local record = get(store, id)
    if record then
      settle_retentions(store, id, record, read_retentions(store, id, record))
    else
      redis.call('ZREM', store.expiring, id)
    end
  end
  count(store, 'expired', #due)
  return #due
end

-- ---- functions ---------------------------------------------------------------------------------------

local function register(name, callback, flags)
  redis.register_function{function_name = 'reprise_VERSION_' .. name, callback = callback, flags = flags}
end

-- owner, lease ms, ids… -> the fences of the leading READY run, back to back
register('lookup', function(keys, args)
  local store = open(keys)
  local owner, lease = args[1], math.min(tonumber(args[2]), MAX_LEASE_MS)
  local asked = #args - 2
  local packed = redis.call('HMGET', store.blocks, unpack(args, 3))
  local fences, put, buckets, uses_of = {}, {}, {}, {}
  local stamp = struct.pack('>I6', store.now)
  for i = 1, asked do
    local id, record = args[i + 2], packed[i]
    if not record or record:byte(1) ~= READY or record:byte(RETAINED) >= CONDEMNED then break end
    fences[i] = record:sub(FENCE_START, FENCE_END)
    local last = record:sub(LAST, REST - 1)
    if record:byte(RETAINED) > 0 then
      local unpacked = unpack_record(record)
      use(store, unpacked)
      renew_retentions(store, id, unpacked, owner)
    else -- `use` on a packed record: a lookup may find a thousand of them
      local value, bucket = record:byte(VALUE), buckets[last]
      if not bucket then
        bucket = age_bucket(store.now - struct.unpack('>I6', last))
        buckets[last] = bucket
      end
      local alike = value * AGES + bucket
      uses_of[alike] = (uses_of[alike] or 0) + 1
      if value % 16 < MAX_USES then value = value + 1 end
      put[#put + 1] = id
      put[#put + 1] = '\1' .. string.char(value) .. (last < stamp and stamp or last) .. record:sub(REST)
    end
  end
  for alike, times in pairs(uses_of) do
    local value = math.floor(alike / AGES)
    happen(store, 'h', math.floor(value / 16), value % 16, alike % AGES, times)
  end
  local found = #fences
  if #put > 0 then redis.call('HSET', store.blocks, unpack(put)) end
  if found > 0 then
    local id = args[found + 2]
    local deepest = get(store, id)
    if lease > 0 then
      if deepest.lease <= store.now then deepest.readers = 0 end
      deepest.readers = math.min(deepest.readers + 1, 65535)
      deepest.lease = math.max(deepest.lease, store.now + lease)
      save(store, id, deepest)
    end
    enqueue_if_leaf(store, id, deepest)
  end
  store.happened.n = 1
  count(store, 'lookups', 1)
  count(store, 'asked', asked)
  count(store, 'found', found)
  tell_recorder(store, 'l', function()
    local ids = {}
    for i = 3, #args do ids[i - 2] = args[i]:sub(1, TRACE_ID_BYTES) end
    return ids
  end)
  close(store)
  return table.concat(fences)
end, {'allow-oom'})

-- ids… -> length of the leading READY run; changes nothing
register('peek', function(keys, args)
  local packed = redis.call('HMGET', keys[1], unpack(args))
  for i = 1, #args do
    local record = packed[i]
    if not record or record:byte(1) ~= READY or record:byte(RETAINED) >= CONDEMNED then return i - 1 end
  end
  return #args
end, {'no-writes'})

-- -> bytes stored, capacity, the density of the block that would go first or '' while nobody has learned any;
-- changes nothing
register('margin', function(keys)
  local store = open(keys)
  local worth = ''
  if weights_of(store) then
    local head, density = least(store, heads_of(store), MAX_PRIORITY, store.now)
    if head then worth = string.format('%.17g', density) end
  end
  return {total(store), tonumber(redis.call('HGET', store.config, 'capacity') or 0), worth}
end, {'no-writes'})

-- id, fence, µs of prefill saved: the reader is done with the run whose deepest block this is
register('release', function(keys, args)
  local store = open(keys)
  count(store, 'saved_us', tonumber(args[3]))
  local record = get(store, args[1])
  if record and record.fence == args[2] and record.readers > 0 and record.lease > store.now then
    record.readers = record.readers - 1
    save(store, args[1], record)
    if record.readers == 0 then
      record.lease = 0
      enqueue_if_leaf(store, args[1], record)
    end
  end
  close(store)
  return redis.status_reply('OK')
end, {'allow-oom'})

-- life ms, blocks (parent before child)… -> statuses, fence, names of dropped payloads, 1 if a further call
-- could make more room. Statuses: W write it, F another is writing it, H stored already, O its parent is not
-- stored, N no room: everything that may be evicted for it ranks above it.
register('reserve', function(keys, args)
  local store = open(keys)
  local capacity, number = unpack(redis.call('HMGET', store.config, 'capacity', 'fence'))
  if not capacity then return redis.error_reply('UNCONFIGURED the store has no capacity') end
  capacity = tonumber(capacity)
  begin_anew_unless_books_add_up(store)
  reap(store, MAX_DUE)
  expire(store, MAX_DUE)
  bury(store)
  local deadline = store.now + math.min(tonumber(args[1]), MAX_RESERVATION_MS)
  -- From the time on: an emptied server, or a replica that was promoted before it had heard of the latest
  -- ones, gives no fence a second time.
  number = math.max(tonumber(number or 0) + 1, store.now * 1024)
  redis.call('HSET', store.config, 'fence', string.format('%.0f', number))
  local fence = struct.pack('>I7', number)

  local blocks, ids, asked = {}, {}, {[ROOT] = true}
  local function ask(id)
    if not asked[id] then ids[#ids + 1] = id end
    asked[id] = true
  end
  for i = 2, #args do
    local id, parent, owner, size, priority, ttl = struct.unpack(RESERVE_BLOCK, args[i])
    blocks[i - 1] = {id = id, parent = parent, owner = owner, size = size, priority = priority, ttl = ttl}
    ask(id)
    ask(parent)
  end
  fetch(store, ids)

  local deadlines = {} -- and ids, as ZADD takes them
  local function make_room(block)
    local quota = limit_of(store, 'quota', block.owner)
    while quota and used(store, block.owner) + block.size > quota do
      if store.victims >= MAX_VICTIMS or not evict_own(store, block.priority, block.owner) then return false end
    end
    while total(store) + block.size > capacity do
      if store.victims >= MAX_VICTIMS or not evict_one(store, block.priority, block.owner) then return false end
    end
    return true
  end

  local function reserve(block)
    local id, record = block.id, get(store, block.id)
    if record and record.condemned == 1 then return 'F' end
    if record and record.state == READY then
      use(store, record)
      save(store, id, record)
      enqueue_if_leaf(store, id, record)
      retain_block(store, id, record, block.owner, block.priority, block.ttl)
      return 'H'
    end
    if record and record.state == WRITING then
      retain_block(store, id, record, block.owner, block.priority, block.ttl)
      return 'F'
    end
    if not record then
      if block.parent ~= ROOT then
        local parent = get(store, block.parent)
        if not parent or parent.condemned == 1 then return 'O' end
        if parent.state == READY and parent.children == 0 then
          dequeue(store, block.parent, parent.owner)
        end
        parent.children = parent.children + 1
        save(store, block.parent, parent)
      end
      record = {
        tier = 1, uses = 0, priority = DEFAULT_PRIORITY, held = 0, retained = 0, condemned = 0, children = 0,
        last = 0, parent = block.parent,
      }
    end
    if record.state == LOST then redis.call('ZREM', store.lost, id) end
    -- Reserved before room is made: a WRITING block and the blocks before it are not victims.
    record.state, record.fence, record.owner, record.size = WRITING, fence, block.owner, 0
    record.readers, record.lease = 0, 0
    save(store, id, record)
    if not make_room(block) then
      remove(store, id)
      return 'N'
    end
    deadlines[#deadlines + 1], deadlines[#deadlines + 2] = deadline, id
    record.size, record.last = block.size, store.now
    record.uses = math.min(MAX_USES, math.max(record.uses, remembered(store, id)) + 1)
    charge(store, block.owner, block.size)
    store.pinned = store.pinned + pinned(record) -- it was lost
    retain_block(store, id, record, block.owner, block.priority, block.ttl)
    return 'W'
  end

  local statuses = {}
  for i = 1, #blocks do statuses[i] = reserve(blocks[i]) end
  if #deadlines > 0 then redis.call('ZADD', store.writing, unpack(deadlines)) end
  count_evicted(store, 'room')
  tell_recorder(store, 'w', function()
    local written = {}
    for i, status in ipairs(statuses) do
      if status == 'W' then
        written[#written + 1] = blocks[i].parent:sub(1, TRACE_ID_BYTES)
        written[#written + 1] = blocks[i].id:sub(1, TRACE_ID_BYTES)
      end
    end
    return written
  end)
  close(store)
  return {table.concat(statuses), fence, table.concat(store.gone), store.victims >= MAX_VICTIMS and 1 or 0}
end)

-- fence, ids… -> one byte a block: 1 it is READY under this fence, 0 the reservation was lost
register('commit', function(keys, args)
  local store = open(keys)
  local fence, ids = args[1], {unpack(args, 2)}
  fetch(store, ids)
  local done, committed = {}, {}
  for i, id in ipairs(ids) do
    local record = get(store, id)
    local mine = record and record.fence == fence and record.state ~= LOST
    if mine and record.state == WRITING then
      record.state, record.last = READY, store.now
      save(store, id, record)
      enqueue_if_leaf(store, id, record)
      committed[#committed + 1] = id
    end
    done[i] = mine and '1' or '0'
  end
  if #committed > 0 then redis.call('ZREM', store.writing, unpack(committed)) end
  count(store, 'committed', #committed)
  close(store)
  return table.concat(done)
end, {'allow-oom'})

-- fence, ids… -> names of dropped payloads
register('abort', function(keys, args)
  local store = open(keys)
  for i = 2, #args do
    local record = get(store, args[i])
    if record and record.state == WRITING and record.fence == args[1] then remove(store, args[i]) end
  end
  close(store)
  return table.concat(store.gone)
end, {'allow-oom'})

-- From now on no lookup finds the block, nor what follows it, nor may any of that be written again, until all
-- of it has gone.
local function condemn(store, id, record)
  redis.call('SADD', store.condemned, id)
  record.condemned = 1
  save(store, id, record)
end

-- id, fence, reason, 1 if what follows the block is as wrong: a reader found no valid payload under this name
-- -> names of dropped payloads
register('quarantine', function(keys, args)
  local store = open(keys)
  local record = get(store, args[1])
  if record and record.state == READY and record.fence == args[2] then
    if args[4] == '1' and record.children > 0 then condemn(store, args[1], record) end
    remove(store, args[1])
    count(store, 'quarantined:' .. args[3], 1)
  end
  close(store)
  return table.concat(store.gone)
end, {'allow-oom'})

-- owner, blocks… -> how many of them have a record
register('retain', function(keys, args)
  local store = open(keys)
  local known = 0
  for i = 2, #args do
    local id, priority, ttl = struct.unpack(RETAIN_BLOCK, args[i])
    local record = get(store, id)
    if record then
      known = known + 1
      retain_block(store, id, record, args[1], priority, ttl)
    end
  end
  close(store)
  return known
end, {'allow-oom'})

-- target bytes, reason -> names of dropped payloads, the total after it, 1 if a further call could evict more
register('evict', function(keys, args)
  local store = open(keys)
  begin_anew_unless_books_add_up(store)
  reap(store, MAX_DUE)
  expire(store, MAX_DUE)
  bury(store)
  local target = tonumber(args[1])
  while total(store) > target and store.victims < MAX_VICTIMS and evict_one(store, MAX_PRIORITY) do end
  count_evicted(store, args[2])
  close(store)
  return {table.concat(store.gone), total(store), store.victims >= MAX_VICTIMS and 1 or 0}
end, {'allow-oom'})

-- limit (at most 1,024) -> reservations reaped, retentions expired, names of dropped payloads
register('upkeep', function(keys, args)
  local store = open(keys)
  begin_anew_unless_books_add_up(store)
  local limit = math.min(tonumber(args[1]), 1024)
  local reaped, expired = reap(store, limit), expire(store, limit)
  bury(store)
  close(store)
  return {reaped, expired, table.concat(store.gone)}
end, {'allow-oom'})

-- -> events, version and history, counts: all of one moment, also where Redis is out of memory (it then refuses
-- transactions of any commands)
register('events', function(keys)
  return {
    redis.call('HGETALL', keys[12]), redis.call('HMGET', keys[13], 'version', 'history'),
    redis.call('HGETALL', keys[9]),
  }
end, {'no-writes'})

-- version, history, weights, then event and count by turns -> 1 if taken: nobody has learned since that version.
-- The counted events are folded into `history` and `weights`.
register('learn', function(keys, args)
  local store = open(keys)
  if tonumber(redis.call('HGET', store.learned, 'version') or 0) ~= tonumber(args[1]) then return 0 end
  local happened = {} -- for good, by what happened and class
  for i = 4, #args, 2 do
    local event = args[i]
    if #event == 3 then
      local what = (event:sub(1, 1) == 'h' and 'uses:' or 'deaths:') .. event:byte(2)
      happened[what] = (happened[what] or 0) + args[i + 1]
    end
    if redis.call('HINCRBY', store.events, args[i], -tonumber(args[i + 1])) == 0 then
      redis.call('HDEL', store.events, args[i])
    end
  end
  for what, times in pairs(happened) do count(store, what, times) end
  redis.call('HSET', store.learned, 'version', args[1] + 1, 'at', string.format('%.0f', store.now),
    'history', args[2], 'weights', args[3])
  return 1
end, {'allow-oom'})

-- ---- for operators -----------------------------------------------------------------------------------

-- Where a prefix that ends in this block comes from: sums over the blocks from its root on, and the deepest block
-- that several stored prefixes share. Nil if that is more to read than a call may.
local function origin(store, id)
  store.origins = store.origins or {}
  local path, above = {}, nil
  while id ~= ROOT do
    above = store.origins[id]
    if above then break end
    if store.walked >= MAX_WALK then return end
    store.walked = store.walked + 1
    local found = get(store, id)
    if not found then return end
    path[#path + 1] = id
    id = found.parent
  end
  for i = #path, 1, -1 do
    local found = get(store, path[i])
    local here = {
      first = above and above.first or path[i],
      blocks = (above and above.blocks or 0) + (found.state == READY and 1 or 0),
      bytes = (above and above.bytes or 0) + found.size,
      pinned_until = above and above.pinned_until or 0,
      whole = found.state == READY and found.condemned == 0 and (not above or above.whole),
    }
    if found.priority == PINNED then
      for _, entry in ipairs(read_retentions(store, path[i], found)) do
        if entry.priority == PINNED then here.pinned_until = math.max(here.pinned_until, entry.expires) end
      end
    end
    here.shared = found.children > 1 and {id = path[i], blocks = here.blocks, bytes = here.bytes}
      or above and above.shared
    store.origins[path[i]] = here
    above = here
  end
  return above
end

-- limit, score and id of the leaf to go on behind ('' at the beginning) -> prefixes by their leaves, those that
-- rank highest first, each packed; 1 if there are more
register('prefixes', function(keys, args)
  local store = open(keys)
  local limit, score, id = tonumber(args[1]), args[2], args[3]
  local found
  if score == '' then
    found = redis.call('ZRANGE', store.leaves, 0, limit, 'REV', 'WITHSCORES')
  elseif redis.call('ZSCORE', store.leaves, id) == score then
    local rank = redis.call('ZREVRANK', store.leaves, id)
    found = redis.call('ZRANGE', store.leaves, rank + 1, rank + 1 + limit, 'REV', 'WITHSCORES')
  else
    found = redis.call('ZRANGE', store.leaves, '(' .. score, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, limit + 1,
      'WITHSCORES')
  end
  local packed = {}
  for i = 1, math.min(limit, #found / 2) do
    local leaf, leaf_record = found[2 * i - 1], get(store, found[2 * i - 1])
    if i > 1 and store.walked >= MAX_WALK then return {packed, 1} end
    local from = origin(store, leaf)
    if i > 1 and not from then return {packed, 1} end
    if leaf_record then
      from = from or {first = ROOT, blocks = 0, bytes = 0, pinned_until = 0, whole = false}
      local shared = from.shared or {id = ROOT, blocks = 0, bytes = 0}
      packed[#packed + 1] = struct.pack('>I7c16c16I4I7c16I4I7I6BBBI6BI6c8', found[2 * i], leaf, from.first,
        from.blocks, from.bytes, shared.id, shared.blocks, shared.bytes,
        math.max(0, store.now - leaf_record.last), leaf_record.priority, leaf_record.tier, leaf_record.uses,
        math.max(0, from.pinned_until - store.now), from.whole and 1 or 0,
        math.max(0, leaf_record.lease - store.now), leaf_record.owner)
    end
  end
  return {packed, #found / 2 > limit and 1 or 0}
end, {'no-writes'})

-- owner, priority, ttl ms (0 takes it back), bytes that may be pinned, last blocks of prefixes -> what came of
-- it (ok; missing and deleting with the block; room with the bytes that would be pinned; many), blocks, their
-- bytes, all pinned bytes. Nothing is done unless all can be.
register('pin', function(keys, args)
  local store = open(keys)
  local owner, priority, ttl, most = args[1], tonumber(args[2]), tonumber(args[3]), tonumber(args[4])
  local ids, seen, bytes, more = {}, {}, 0, 0
  for i = 5, #args do
    local id = args[i]
    while id ~= ROOT and not seen[id] do
      if #ids >= MAX_PINNED then return {'many', args[i]} end
      local found = get(store, id)
      if not found or found.state ~= READY then return {'missing', args[i]} end
      if found.condemned == 1 then return {'deleting', args[i]} end
      seen[id] = true
      ids[#ids + 1] = id
      bytes = bytes + found.size
      if priority == PINNED and ttl > 0 then more = more + found.size - pinned(found) end
      id = found.parent
    end
  end
  local now = tonumber(redis.call('HGET', store.bytes, 'pinned') or 0)
  if more > 0 and now + more > most then return {'room', string.format('%.0f', now + more)} end
  for _, id in ipairs(ids) do
    local found = get(store, id)
    if ttl > 0 then
      retain_block(store, id, found, owner, priority, ttl)
    elseif found.retained == 1 then
      local list = read_retentions(store, id, found)
      for _, entry in ipairs(list) do
        if entry.owner == owner and entry.priority == priority then entry.expires = 0 end
      end
      settle_retentions(store, id, found, list)
    end
  end
  close(store)
  return {'ok', #ids, bytes, now + store.pinned}
end, {'allow-oom'})

-- id -> 1 if from now on no lookup finds it, nor what follows it, until all of that is gone; 0 it is not stored,
-- -1 too many are
register('condemn', function(keys, args)
  local store = open(keys)
  local id = args[1]
  local found = get(store, id)
  if not found then return 0 end
  if found.condemned == 0 and redis.call('SCARD', store.condemned) >= MAX_CONDEMNED then return -1 end
  condemn(store, id, found)
  close(store)
  return 1
end, {'allow-oom'})

-- -> condemned blocks, and those that have been LOST for too long: what follows them is to go
register('doomed', function(keys)
  local store = open(keys)
  local lost = redis.call('ZRANGEBYSCORE', store.lost, '-inf', store.now, 'LIMIT', 0, MAX_DOOMED)
  return {table.concat(redis.call('SMEMBERS', store.condemned)), table.concat(lost)}
end, {'no-writes'})

-- ids, children before parents -> one byte a block: 1 it is gone, 0 it has to wait for a reader or a child;
-- names of dropped payloads. For condemned blocks and what follows them, and what follows lost ones.
register('drop', function(keys, args)
  local store = open(keys)
  fetch(store, args)
  local gone = {}
  for i, id in ipairs(args) do
    local found = get(store, id)
    if found and found.lease <= store.now and found.children == 0 then remove(store, id) end
    gone[i] = get(store, id) and '0' or '1'
    if not found then redis.call('SREM', store.condemned, id) end
  end
  count(store, 'deleted', #store.gone)
  close(store)
  return {table.concat(gone), table.concat(store.gone)}
end, {'allow-oom'})
