#!lua name=reprise_store_VERSION
-- The store's metadata and every change to it. `functions.py` holds the callers and describes the keys.
--
-- One packed record a block, in the hash `blocks`. States of a record:
--   WRITING  reserved by a writer until a deadline; never found by a lookup
--   READY    its payload is in place
--   LOST     its payload is gone or was found bad while children are stored; a writer may write it again
-- What always holds (tests/cache_store/test_functions_model.py):
--   a record's parent is the root or has a record; `children` counts the records that name it as parent;
--   a block is in `leaves` if and only if it is READY and has no children; a LOST block has children;
--   the sum of sizes is `total`, and no reservation takes it beyond the capacity.
--
-- Last uses travel upwards lazily: a lookup stamps only the deepest block it found, and a block that leaves
-- hands its stamp to its parent. So when a block becomes a leaf, its stamp is the last use of its whole former
-- subtree, and a lookup of 1,024 blocks writes one record. For the same reason a lease on the deepest block
-- protects all blocks before it: none of them can be a leaf while it is stored.

local WRITING, READY, LOST = 0, 1, 2
local RECORD = '>BBBBHI4I4I6I6c7c8c16'
local FENCE_START, FENCE_END = 27, 33 -- of `fence` inside a packed record
local RETENTION, RETENTION_BYTES = '>c8BI6I6', 21
local RESERVE_BLOCK, RETAIN_BLOCK = '>c16c16c8I4BI6', '>c16BI6'
local ROOT = '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0'
local NO_FENCE = '\0\0\0\0\0\0\0'
local NEVER = 281474976710655 -- 2^48 - 1 ms
local PRIORITY_STEP = 4398046511104 -- 2^42 ms: a step of priority outweighs any last use until the year 2109
local DEFAULT_PRIORITY, MAX_PRIORITY = 35, 100
local MAX_RETENTIONS = 8 -- a block; the weakest is forgotten
local MAX_VICTIMS = 64 -- a call: about 1 ms of the server's only thread
local MAX_EXAMINED = 1024 -- heads of the queue looked at in a call, leased ones included
local MAX_DUE = 64 -- overdue reservations and retentions settled by a call that is about to evict
local MAX_LEASE_MS, MAX_RESERVATION_MS = 30000, 60000

-- ---- one call's view of the store --------------------------------------------------------------------

local function open(keys)
  local clock = redis.call('TIME') -- the only clock: workers' clocks may differ
  return {
    blocks = keys[1], leaves = keys[2], writing = keys[3], retained = keys[4], expiring = keys[5],
    bytes = keys[6], config = keys[7], dropped = keys[8], counts = keys[9],
    now = clock[1] * 1000 + math.floor(clock[2] / 1000),
    records = {}, changed = {}, charges = {}, gone = {},
    passed = {}, passed_count = 0, passed_score = 0, examined = 0, victims = 0,
  }
end

local function unpack_record(packed)
  local state, priority, held, retained, readers, children, size, last, lease, fence, owner, parent =
    struct.unpack(RECORD, packed)
  return {
    state = state, priority = priority, held = held, retained = retained, readers = readers,
    children = children, size = size, last = last, lease = lease, fence = fence, owner = owner, parent = parent,
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

local function charge(store, owner, bytes)
  store.total = total(store) + bytes
  store.charges[owner] = (store.charges[owner] or 0) + bytes
end

local function close(store)
  local put, delete = {}, {}
  for id in pairs(store.changed) do
    local r = store.records[id]
    if r then
      put[#put + 1] = id
      put[#put + 1] = struct.pack(RECORD, r.state, r.priority, r.held, r.retained, r.readers, r.children,
        r.size, r.last, r.lease, r.fence, r.owner, r.parent)
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
end

local function count(store, what, by)
  if by > 0 then redis.call('HINCRBY', store.counts, what, by) end
end

-- ---- the eviction queue ----------------------------------------------------------------------------
-- `passed` are the heads of the queue that this call found and left alone. When one of them moves, or another
-- block sorts in among them, the count says nothing any more and the search starts at the head again.

local function pass_none(store)
  store.passed, store.passed_count, store.passed_score = {}, 0, 0
end

local function enqueue_if_leaf(store, id, record)
  if record.state == READY and record.children == 0 then
    local score = record.priority * PRIORITY_STEP + record.last
    redis.call('ZADD', store.leaves, score, id)
    if score <= store.passed_score or store.passed[id] then pass_none(store) end
  end
end

local function dequeue(store, id)
  redis.call('ZREM', store.leaves, id)
  if store.passed[id] then pass_none(store) end
end

-- Takes a block's payload away, and its record too unless children hang on it; goes on to its parent if
-- that waited, LOST, for its last child.
local function remove(store, id)
  local record = get(store, id)
  if record.state == WRITING then
    redis.call('ZREM', store.writing, id)
  elseif record.state == READY and record.children == 0 then
    dequeue(store, id)
  end
  if record.state ~= LOST then
    store.gone[#store.gone + 1] = id .. record.fence
    redis.call('SADD', store.dropped, id .. record.fence)
    charge(store, record.owner, -record.size)
  end
  if record.children > 0 then
    record.state, record.size, record.fence, record.lease, record.readers = LOST, 0, NO_FENCE, 0, 0
    return save(store, id, record)
  end
  if record.retained == 1 then
    redis.call('HDEL', store.retained, id)
    redis.call('ZREM', store.expiring, id)
  end
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

-- Evicts the leaf that is first in order of (effective priority, last use). False if none is left that may
-- go: not leased, of at most `max_priority`.
local function evict_one(store, max_priority)
  while store.examined < MAX_EXAMINED do
    store.examined = store.examined + 1
    local head = redis.call('ZRANGE', store.leaves, store.passed_count, store.passed_count, 'WITHSCORES')
    local id, score = head[1], tonumber(head[2])
    if not id or math.floor(score / PRIORITY_STEP) > max_priority then return false end
    local record = get(store, id)
    if not record then
      dequeue(store, id)
    elseif record.lease > store.now then
      store.passed[id], store.passed_count, store.passed_score = true, store.passed_count + 1, score
    else
      store.victims = store.victims + 1
      remove(store, id)
      return true
    end
  end
  return false
end

-- ---- retention ---------------------------------------------------------------------------------------
-- A block's retentions are a set: (owner, priority) -> expiry. Its effective priority is the highest one that
-- is live; `held` says that somebody wants the default for good, which is kept as one bit because nearly
-- every block has just that. So no use by another can lower a block, and none can end its time limit.

local function read_retentions(store, id, record)
  local list = {}
  if record.retained == 1 then
    local packed = redis.call('HGET', store.retained, id) or ''
    for at = 1, #packed, RETENTION_BYTES do
      local owner, priority, ttl, expires = struct.unpack(RETENTION, packed, at)
      list[#list + 1] = {owner = owner, priority = priority, ttl = ttl, expires = expires}
    end
  end
  return list
end

local function stronger(a, b)
  if a.priority ~= b.priority then return a.priority > b.priority end
  if a.expires ~= b.expires then return a.expires > b.expires end
  return a.owner < b.owner
end

-- Forgets what has expired, writes the rest back and brings the effective priority and the queue up to date.
local function settle_retentions(store, id, record, list)
  local live = {}
  for _, entry in ipairs(list) do
    if entry.expires > store.now then live[#live + 1] = entry end
  end
  table.sort(live, stronger)
  local packed, earliest = {}, NEVER
  for i = 1, math.min(#live, MAX_RETENTIONS) do
    packed[i] = struct.pack(RETENTION, live[i].owner, live[i].priority, live[i].ttl, live[i].expires)
    earliest = math.min(earliest, live[i].expires)
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
  save(store, id, record)
  enqueue_if_leaf(store, id, record)
end

local function retain_block(store, id, record, owner, priority, ttl)
  if priority == DEFAULT_PRIORITY and ttl == NEVER then
    if record.held == 0 then
      record.held = 1
      if record.retained == 0 then return save(store, id, record) end
      settle_retentions(store, id, record, read_retentions(store, id, record))
    end
    return
  end
  local list, entry = read_retentions(store, id, record), nil
  for _, known in ipairs(list) do
    if known.owner == owner and known.priority == priority and known.expires > store.now then entry = known end
  end
  if not entry then
    entry = {owner = owner, priority = priority, ttl = ttl, expires = 0}
    list[#list + 1] = entry
  end
  entry.ttl = math.max(entry.ttl, ttl)
  entry.expires = math.max(entry.expires, ttl == NEVER and NEVER or store.now + ttl)
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
  redis.call('UNLINK', store.blocks, store.leaves, store.writing, store.retained, store.expiring, store.bytes)
  redis.call('HDEL', store.config, 'identity')
  count(store, 'begun_anew', 1)
  store.records, store.total = {}, nil
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
  local fences = {}
  for i = 1, asked do
    local record = packed[i]
    if not record or record:byte(1) ~= READY then break end
    fences[i] = record:sub(FENCE_START, FENCE_END)
    if record:byte(4) == 1 then
      local id = args[i + 2]
      store.records[id] = unpack_record(record)
      renew_retentions(store, id, store.records[id], owner)
    end
  end
  local found = #fences
  if found > 0 then
    local id = args[found + 2]
    local deepest = store.records[id] or unpack_record(packed[found])
    deepest.last = math.max(deepest.last, store.now)
    if lease > 0 then
      if deepest.lease <= store.now then deepest.readers = 0 end
      deepest.readers = math.min(deepest.readers + 1, 65535)
      deepest.lease = math.max(deepest.lease, store.now + lease)
    end
    save(store, id, deepest)
    enqueue_if_leaf(store, id, deepest)
  end
  count(store, 'lookups', 1)
  count(store, 'asked', asked)
  count(store, 'found', found)
  close(store)
  return table.concat(fences)
end, {'allow-oom'})

-- ids… -> length of the leading READY run; changes nothing
register('peek', function(keys, args)
  local packed = redis.call('HMGET', keys[1], unpack(args))
  for i = 1, #args do
    if not packed[i] or packed[i]:byte(1) ~= READY then return i - 1 end
  end
  return #args
end, {'no-writes'})

-- id, fence: the reader is done with the run whose deepest block this is
register('release', function(keys, args)
  local store = open(keys)
  local record = get(store, args[1])
  if record and record.fence == args[2] and record.readers > 0 and record.lease > store.now then
    record.readers = record.readers - 1
    if record.readers == 0 then record.lease = 0 end
    save(store, args[1], record)
  end
  close(store)
  return redis.status_reply('OK')
end, {'allow-oom'})

-- life ms, blocks (parent before child)… -> statuses, fence, names of dropped payloads, 1 if a further call
-- could make more room. Statuses: W write it, F another is writing it, H stored already, O its parent is not
-- stored, N no room: everything that may be evicted for it ranks above it.
register('reserve', function(keys, args)
  local store = open(keys)
  local capacity = tonumber(redis.call('HGET', store.config, 'capacity'))
  if not capacity then return redis.error_reply('UNCONFIGURED the store has no capacity') end
  begin_anew_unless_books_add_up(store)
  reap(store, MAX_DUE)
  expire(store, MAX_DUE)
  local deadline = store.now + math.min(tonumber(args[1]), MAX_RESERVATION_MS)
  local number = redis.call('HINCRBY', store.config, 'fence', 1)
  if number == 1 then -- a new or emptied store: start above every fence that it may have given before
    number = math.floor(store.now / 1000) * 1048576
    redis.call('HSET', store.config, 'fence', string.format('%.0f', number))
  end
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
    while total(store) + block.size > capacity do
      if store.victims >= MAX_VICTIMS or not evict_one(store, block.priority) then return false end
    end
    return true
  end

  local function reserve(block)
    local id, record = block.id, get(store, block.id)
    if record and record.state == READY then
      record.last = store.now
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
        if not parent then return 'O' end
        if parent.state == READY and parent.children == 0 then
          dequeue(store, block.parent)
        end
        parent.children = parent.children + 1
        save(store, block.parent, parent)
      end
      record = {priority = DEFAULT_PRIORITY, held = 0, retained = 0, children = 0, last = 0, parent = block.parent}
    end
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
    charge(store, block.owner, block.size)
    retain_block(store, id, record, block.owner, block.priority, block.ttl)
    return 'W'
  end

  local statuses = {}
  for i = 1, #blocks do statuses[i] = reserve(blocks[i]) end
  if #deadlines > 0 then redis.call('ZADD', store.writing, unpack(deadlines)) end
  count(store, 'evicted:room', store.victims)
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

-- id, fence, reason: a reader found no valid payload under this name -> names of dropped payloads
register('quarantine', function(keys, args)
  local store = open(keys)
  local record = get(store, args[1])
  if record and record.state == READY and record.fence == args[2] then
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
  local target = tonumber(args[1])
  while total(store) > target and store.victims < MAX_VICTIMS and evict_one(store, MAX_PRIORITY) do end
  count(store, 'evicted:' .. args[2], store.victims)
  close(store)
  return {table.concat(store.gone), total(store), store.victims >= MAX_VICTIMS and 1 or 0}
end, {'allow-oom'})

-- limit (at most 1,024) -> reservations reaped, retentions expired, names of dropped payloads
register('upkeep', function(keys, args)
  local store = open(keys)
  begin_anew_unless_books_add_up(store)
  local limit = math.min(tonumber(args[1]), 1024)
  local reaped, expired = reap(store, limit), expire(store, limit)
  close(store)
  return {reaped, expired, table.concat(store.gone)}
end, {'allow-oom'})
