"""A local Azure Service Bus: AMQP 1.0 on loopback, for the unmodified azure-servicebus SDK.

    python -m examples.servicebus_emulator --queue tasks --session-queue tasks-replies

prints a connection string and serves until SIGTERM or SIGINT; only the second queue requires sessions. In a test:

    with ServiceBusEmulator(["tasks"], session_queue=["tasks-replies"], lock_duration=10) as emulator:
        client = ServiceBusClient.from_connection_string(emulator.connection_string)
        emulator.control("drop")

python-qpid-proton does the protocol, boilermaker's embedded queue stores the messages. This file adds what makes
that a Service Bus: tokens, peek-lock, sessions, a management node for every queue, the errors that the SDK knows by
name, and faults on demand. Topics, transactions, TLS and the listing of sessions are left out.

What arrives in one read is one turn of the service: it is handled, receivers that wait are served, the store commits,
and only then does anything leave for a client.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hmac
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

try:
    import proton
except ImportError as error:
    raise ImportError("The emulator needs python-qpid-proton: pip install python-qpid-proton.") from error

from boilermaker import DEAD_LETTER_SUFFIX, DEFERRED, LOCKED, READY, Delivery, Outgoing, QueueSettings, Store

# --- Vocabulary -------------------------------------------------------------------------------------------------------

HOST = "127.0.0.1"
KEY_NAME = "RootManageSharedAccessKey"
KEY = base64.b64encode(b"loopback only: not a secret").decode()

TOKEN_NODE = "$cbs"
TOKEN_FIELDS = ("status-code", "status-description")  # of an answer; the nodes differ in how they spell them
MANAGEMENT_SUFFIX = "/$management"
MANAGEMENT_FIELDS = ("statusCode", "statusDescription", "errorCondition")

SESSION_FILTER = proton.symbol("com.microsoft:session-filter")  # of a source: a session's id, null for the next one
LOCKED_UNTIL = proton.symbol("com.microsoft:locked-until-utc")  # of a link: in ticks
TIMEOUT = proton.symbol("com.microsoft:timeout")  # of a link: how many milliseconds it waits for the next session
DEFAULT_TIMEOUT = 60_000
UNIX_EPOCH_TICKS = 621_355_968_000_000_000  # since the year 1, of 100 ns each

MAX_FRAME_BYTES = 65536
SEND_CREDIT = 1000  # messages that a sender may have under way
MOST_PEEKED = 250  # messages that one request to peek gets

STATUS = {
    "amqp:decode-error": 400,
    "amqp:not-allowed": 400,
    "amqp:unauthorized-access": 401,
    "amqp:not-found": 404,
    "com.microsoft:message-not-found": 404,
    "com.microsoft:timeout": 408,
    "com.microsoft:message-lock-lost": 410,
    "com.microsoft:session-cannot-be-locked": 410,
    "com.microsoft:session-lock-lost": 410,
    "amqp:link:message-size-exceeded": 413,
    "amqp:not-implemented": 501,
    "amqp:link:detach-forced": 503,
    "com.microsoft:server-busy": 503,
}


class Refusal(Exception):
    """A request that the service turns down. The SDK chooses its exception by the condition, one of STATUS."""

    def __init__(self, condition: str, description: str) -> None:
        super().__init__(description)
        self.condition = condition
        self.description = description
        self.status = STATUS[condition]

    def as_condition(self) -> proton.Condition:
        # The SDK reads all three fields of an error, and waits for ever where the last one was left out.
        return proton.Condition(self.condition, self.description, {proton.symbol("status"): proton.int32(self.status)})


class Lock(Delivery):
    """What a receiver holds. The pair fences it off once another has received the message."""

    def __init__(self, sequence_number: int, delivery_count: int) -> None:
        super().__init__(sequence_number, delivery_count, None, b"", {}, locked_until=0)

    @property
    def token(self) -> uuid.UUID:
        return uuid.UUID(int=self.sequence_number << 64 | self.delivery_count)

    @classmethod
    def of_token(cls, token: uuid.UUID) -> Lock:
        return cls(token.int >> 64, token.int & (1 << 64) - 1)


# --- Encoded messages -------------------------------------------------------------------------------------------------

# The body in the store is the whole message as its sender encoded it. To deliver it, the sections that belong to the
# broker are replaced, and the others passed on byte for byte. (The engine's Message would lose some kinds of body.)

HEADER, DELIVERY_ANNOTATIONS, ANNOTATIONS, PROPERTIES, APPLICATION_PROPERTIES, DATA = range(0x70, 0x76)
FOOTER = 0x78
FIXED_WIDTHS = {0x4: 0, 0x5: 1, 0x6: 2, 0x7: 4, 0x8: 8, 0x9: 16}
DEAD_LETTER_PROPERTIES = ("DeadLetterReason", "DeadLetterErrorDescription")
STATE_ACTIVE, STATE_DEFERRED, STATE_SCHEDULED = range(3)  # of x-opt-message-state


class Row(NamedTuple):
    """A stored message, by the columns of its table."""

    sequence_number: int
    delivery_count: int
    state: int
    due: float
    body: bytes
    enqueued_time: float
    dead_letter_reason: str | None
    dead_letter_error_description: str | None
    session_id: str | None

    @property
    def lock(self) -> Lock:
        return Lock(self.sequence_number, self.delivery_count - (self.state == LOCKED))


def value_end(encoded: bytes, start: int) -> int:
    """Where the AMQP value that begins at `start` ends. Its first byte says how its size is told."""
    constructor = encoded[start]
    if constructor == 0:  # a described value: its descriptor, then the value itself
        return value_end(encoded, value_end(encoded, start + 1))
    kind = constructor >> 4
    if kind in FIXED_WIDTHS:
        return start + 1 + FIXED_WIDTHS[kind]
    if kind in (0xA, 0xC, 0xE):
        return start + 2 + encoded[start + 1]
    return start + 5 + int.from_bytes(encoded[start + 1 : start + 5], "big")


def sections(encoded: bytes) -> list[tuple[int, bytes]]:
    """The sections of a message in order, each with its code; ValueError or IndexError if it is not a message."""
    found, start = [], 0
    while start < len(encoded):
        end = value_end(encoded, start)
        code = int.from_bytes(encoded[start + 2 : value_end(encoded, start + 1)], "big")
        if encoded[start] != 0 or not HEADER <= code <= FOOTER or end > len(encoded):
            raise ValueError("not an AMQP message")
        found.append((code, encoded[start:end]))
        start = end
    return found


def decode(found: list[tuple[int, bytes]], codes: Iterable[int]) -> dict[int, Any]:
    """The values of those sections that have one of the codes."""
    values = {}
    for code, section in found:
        if code in codes:
            data = proton.Data()
            data.decode(section)
            data.rewind()
            data.next()
            described: Any = data.get_object()
            values[code] = described.value
    return values


def encode(code: int, value: Any) -> bytes:
    data = proton.Data()
    data.put_object(proton.Described(proton.ulong(code), value))
    return bytes(data.encode())


def unbatch(encoded: bytes) -> list[bytes]:
    """The messages that one transfer carries.

    The engine keeps the format of a transfer to itself, so a batch is told by its shape: each of its data sections
    holds a whole message.
    """
    starts = [(section, value_end(section, 1)) for code, section in sections(encoded) if code == DATA]
    contents = [section[start + (2 if section[start] == 0xA0 else 5) :] for section, start in starts]
    return contents if contents and all(map(is_message, contents)) else [encoded]


def is_message(encoded: bytes) -> bool:
    with contextlib.suppress(ValueError, IndexError):
        return bool(sections(encoded))
    return False


def parse(queue: str, encoded: bytes, with_session: bool) -> tuple[Outgoing, float | None, str | None]:
    """A message for the embedded queue, the seconds that it may live, if it says so, and its session, if it has one."""
    values = decode(sections(encoded), (HEADER, ANNOTATIONS, PROPERTIES))
    properties = values.get(PROPERTIES, [])
    (message_id,) = properties[:1] or [None]
    (session_id,) = properties[10:11] or [None]
    if with_session and not session_id:
        raise Refusal("amqp:not-allowed", f"The SessionId was not set on a message, and '{queue}' requires sessions.")
    (milliseconds,) = values.get(HEADER, [])[2:3] or [None]
    scheduled = values.get(ANNOTATIONS, {}).get("x-opt-scheduled-enqueue-time")
    due = None if scheduled is None else scheduled / 1000
    time_to_live = None if milliseconds is None else milliseconds / 1000
    message_id = str(uuid.uuid4() if message_id is None else message_id)
    return Outgoing(encoded, message_id, queue, due), time_to_live, session_id if with_session else None


def for_receiver(row: Row, now: float) -> bytes:
    """A stored message as a receiver gets it: with the broker's header, annotations and dead-letter properties."""
    found = sections(row.body)
    texts = (row.dead_letter_reason, row.dead_letter_error_description)
    added = {name: text for name, text in zip(DEAD_LETTER_PROPERTIES, texts, strict=True) if text}
    own: dict[int, Any] = {HEADER: [], ANNOTATIONS: {}} | ({APPLICATION_PROPERTIES: {}} if added else {})
    own |= decode(found, own)
    own[HEADER] = [*[*own[HEADER], None, None, None, None][:4], proton.uint(row.lock.delivery_count)]
    own[ANNOTATIONS] |= broker_annotations(row, now)
    if added:
        own[APPLICATION_PROPERTIES] |= added
    parts = [(code, section) for code, section in found if code not in own and code != DELIVERY_ANNOTATIONS]
    parts += [(code, encode(code, value)) for code, value in own.items()]
    # The codes ascend in the order that the specification wants; several data sections keep theirs.
    return b"".join(section for _, section in sorted(parts, key=lambda part: part[0]))


def with_properties(encoded: bytes, properties: Mapping[str, Any]) -> bytes:
    """A message with some application properties more, or other ones."""
    found = sections(encoded)
    own = decode(found, [APPLICATION_PROPERTIES]).get(APPLICATION_PROPERTIES, {})
    parts = [(code, section) for code, section in found if code != APPLICATION_PROPERTIES]
    parts.append((APPLICATION_PROPERTIES, encode(APPLICATION_PROPERTIES, {**own, **properties})))
    return b"".join(section for _, section in sorted(parts, key=lambda part: part[0]))


def broker_annotations(row: Row, now: float) -> dict[proton.symbol, Any]:
    waiting = STATE_SCHEDULED if row.due > now and row.state != LOCKED else STATE_ACTIVE
    known = {
        "x-opt-enqueued-time": proton.timestamp(row.enqueued_time * 1000),
        "x-opt-sequence-number": row.sequence_number,
        "x-opt-message-state": proton.int32(STATE_DEFERRED if row.state == DEFERRED else waiting),
    }
    if row.state == LOCKED:
        known["x-opt-locked-until"] = proton.timestamp(row.due * 1000)
    return {proton.symbol(name): value for name, value in known.items()}


# --- Broker -----------------------------------------------------------------------------------------------------------


@dataclass
class Faults:
    """What is to go wrong."""

    busy: float = 0  # that many sends are turned down; scheduling is one too
    lose: float = 0  # that many settlements are applied, and the connection is cut instead of answering
    mute: float = 0  # that many settlements are applied, and never answered
    slow: float = 0  # settlements are that many seconds late, until this is 0 again
    unlock: float = 0  # the locks of a connection that is lost are released at once, until this is 0 again

    def due(self, name: str) -> bool:
        """Whether it is to happen now; if so, once less from now on."""
        left: float = getattr(self, name)
        setattr(self, name, max(left - 1, 0))
        return left > 0


@dataclass
class SessionLock:
    """The hold of one receiver on a session, and on all that it has received of it."""

    receiver: str  # the name of its link
    locked_until: float
    given_back: bool = False  # the link is gone


IN_SESSION = "queue_id = ? AND session_id = ?"


def session_lock_lost(session_id: str) -> Refusal:
    text = f"The lock of session '{session_id}' has expired, or another receiver has it. Accept a new session."
    return Refusal("com.microsoft:session-lock-lost", text)


class Broker(Store):
    """The queues of one namespace: the embedded queue, and what Service Bus has besides.

    The embedded queue lets the holder of an expired lock settle as long as nobody else has received the message.
    Service Bus does not, so whoever settles or renews here calls `hold` first. All calls are made in a transaction.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        super().__init__(":memory:")
        self.settings = settings  # as on the command line
        self.faults = Faults()
        self.names: dict[str, str] = {}
        self.stirred: set[str] = set()  # queues in which something may have become available
        self.session_locks: dict[str, dict[str, SessionLock]] = {queue: {} for queue in settings.session_queue}
        self.session_states: dict[tuple[str, str], bytes] = {}  # they outlive locks and messages
        self.sql.execute("ALTER TABLE message ADD COLUMN session_id TEXT")
        self.sql.execute(
            "CREATE INDEX message_session ON message (queue_id, session_id, state, due) WHERE session_id IS NOT NULL"
        )
        for queue in settings.queue + settings.session_queue:
            self.open_queue(queue, QueueSettings(*(getattr(settings, name) for name in QueueSettings._fields)))
            self.open_queue(queue + DEAD_LETTER_SUFFIX, QueueSettings(max_delivery_count=None))
            self.names |= {name.lower(): name for name in (queue, queue + DEAD_LETTER_SUFFIX)}

    def find(self, path: str) -> str:
        """The queue of that name, in which the service ignores case."""
        if path.lower() not in self.names:
            raise Refusal("amqp:not-found", f"The messaging entity '{path}' could not be found.")
        return self.names[path.lower()]

    def rows(self, condition: str, *parameters: Any) -> list[Row]:
        sql = f"SELECT {', '.join(Row._fields)} FROM message WHERE {condition}"
        return [Row(*row) for row in self.sql.execute(sql, parameters)]

    def numbered(self, sequence_numbers: Iterable[int]) -> list[Row]:
        wanted = "sequence_number IN (SELECT value FROM json_each(?)) ORDER BY sequence_number"
        return self.rows(wanted, json.dumps(list(sequence_numbers)))

    def peek_rows(
        self, queue: str, max_message_count: int, from_sequence_number: int, session_id: str | None
    ) -> list[Row]:
        condition = (
            "queue_id = ? AND sequence_number >= ? AND ifnull(session_id = ?, 1) ORDER BY sequence_number LIMIT ?"
        )
        return self.rows(condition, self._queue(queue)[0], from_sequence_number, session_id, max_message_count)

    def send(self, queue: str, transfers: list[bytes]) -> list[int]:
        """Store what the transfers carry, all of it or nothing; the sequence numbers."""
        if self.faults.due("busy"):
            raise Refusal("com.microsoft:server-busy", "The request was terminated because the entity is throttled.")
        size, limit = max(map(len, transfers), default=0), self.settings.max_message_bytes
        if size > limit:
            text = f"The message (size: {size} bytes) exceeds the limit ({limit} bytes) of the link."
            raise Refusal("amqp:link:message-size-exceeded", text)
        try:
            with_session = queue in self.session_locks
            messages = [parse(queue, single, with_session) for encoded in transfers for single in unbatch(encoded)]
        except (ValueError, IndexError, proton.ProtonException) as error:
            raise Refusal("amqp:decode-error", str(error)) from error
        now = time.time()
        self.stirred.add(queue)
        numbers = self.insert([message for message, *_ in messages], now)
        for number, (message, time_to_live, session_id) in zip(numbers, messages, strict=True):
            if session_id is not None:  # the number may be that of an earlier message, of which this is a duplicate
                sql = "UPDATE message SET session_id = ? WHERE sequence_number = ? AND session_id IS NULL"
                self._changed(sql, (session_id, number))
            if time_to_live is not None:  # the message expires then, unless its queue lets it expire earlier
                expires = max(message.due or now, now) + time_to_live
                sql = "UPDATE message SET expires = min(?, ifnull(expires, ?)) WHERE sequence_number = ?"
                self._changed(sql, (expires, expires, number))
        return numbers

    def receive(self, queue: str, max_message_count: int) -> list[tuple[Lock, bytes]]:
        now = time.time()
        claimed = self.claim(queue, max_message_count, self.settings.lock_duration, now)
        return [(row.lock, for_receiver(row, now)) for row in self.numbered(each.sequence_number for each in claimed)]

    def claim_deferred(self, queue: str, sequence_number: int, session_id: str | None, now: float) -> bool:
        """Lock a deferred message. Given back, it is an active one: a simplification."""
        until = now + self.settings.lock_duration
        if session_id is not None:
            until = self.session_locks[queue][session_id].locked_until
        deferred = "queue_id = ? AND sequence_number = ? AND state = ? AND ifnull(session_id = ?, 1)"
        sql = f"UPDATE message SET state = ?, due = ?, delivery_count = delivery_count + 1 WHERE {deferred}"
        return self._changed(sql, (LOCKED, until, self._queue(queue)[0], sequence_number, DEFERRED, session_id))

    def hold(self, lock: Lock) -> float:
        """Make sure that the lock is still good; the time that this was checked for."""
        now = time.time()
        held = "sequence_number = ? AND delivery_count = ? AND state = ? AND due > ?"
        if not self.rows(held, lock.sequence_number, lock.delivery_count + 1, LOCKED, now):
            text = "The lock is invalid: it has expired, or the message was already removed from the queue."
            raise Refusal("com.microsoft:message-lock-lost", text)
        return now

    def let_go(
        self,
        queue: str,
        lock: Lock,
        status: str,
        reason: str = "",
        description: str = "",
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        """Let go of a message. The status is the service's word for how, or `released`: as if never delivered."""
        now = self.hold(lock)
        self.stirred.add(queue)
        if properties:
            [row] = self.numbered([lock.sequence_number])
            body = with_properties(row.body, properties)
            self._changed("UPDATE message SET body = ? WHERE sequence_number = ?", (body, lock.sequence_number))
        if status == "suspended" and queue.endswith(DEAD_LETTER_SUFFIX):
            raise Refusal("amqp:not-allowed", f"A message cannot be dead-lettered out of '{queue}'.")
        if status == "abandoned" and lock.delivery_count + 1 == self._queue(queue)[1].max_delivery_count:
            status, reason = "suspended", "MaxDeliveryCountExceeded"
            description = f"It was delivered {lock.delivery_count + 1} times, never settled."
        if status == "completed":
            self.complete([lock])
        elif status == "suspended":
            self.dead_letter(queue, lock, reason, description, now)
        else:
            state, counted = {"abandoned": (READY, 1), "released": (READY, 0), "defered": (DEFERRED, 1)}[status]
            sql = "UPDATE message SET state = ?, due = enqueued_time, delivery_count = ? WHERE sequence_number = ?"
            self._changed(sql, (state, lock.delivery_count + counted, lock.sequence_number))

    def counts(self, now: float) -> dict[str, int]:
        kinds = """
            CASE WHEN name LIKE '%' || ? THEN 'dead' WHEN state = ? THEN 'deferred' WHEN due <= ? THEN 'active'
                 WHEN state = ? THEN 'locked' ELSE 'scheduled' END
        """
        sql = f"SELECT {kinds}, count(*) FROM message JOIN queue USING (queue_id) GROUP BY 1"
        counted = self.sql.execute(sql, (DEAD_LETTER_SUFFIX, DEFERRED, now, LOCKED)).fetchall()
        return dict.fromkeys(("active", "locked", "scheduled", "deferred", "dead"), 0) | dict(counted)

    # -- sessions

    def free_session(self, queue: str, now: float) -> str | None:
        """The session of the message that has waited longest, of those that nobody holds."""
        free = "queue_id = ? AND state = ? AND due <= ? AND session_id NOT IN (SELECT value FROM json_each(?))"
        held = json.dumps(list(self.session_locks[queue]))
        rows = self.rows(f"{free} ORDER BY due, sequence_number LIMIT 1", self._queue(queue)[0], READY, now, held)
        return rows[0].session_id if rows else None

    def lock_session(self, queue: str, session_id: str, receiver: str, now: float) -> None:
        self.session_locks[queue][session_id] = SessionLock(receiver, now + self.settings.lock_duration)

    def hold_session(self, queue: str, session_id: str, receiver: str | None) -> None:
        """Make sure that the receiver still holds the session."""
        lock = self.session_locks.get(queue, {}).get(session_id)
        if lock is None or lock.receiver != receiver or lock.locked_until <= time.time():
            raise session_lock_lost(session_id)

    def renew_session(self, queue: str, session_id: str, now: float) -> float:
        """Lock a held session, and what was received of it, anew; until when."""
        lock = self.session_locks[queue][session_id]
        lock.locked_until = now + self.settings.lock_duration
        sql = f"UPDATE message SET due = ? WHERE {IN_SESSION} AND state = ?"
        self.sql.execute(sql, (lock.locked_until, self._queue(queue)[0], session_id, LOCKED))
        return lock.locked_until

    def receive_in_session(self, queue: str, session_id: str, max_message_count: int) -> list[tuple[Lock, bytes]]:
        """The next messages of a held session, which are locked for as long as it is."""
        now, (queue_id, settings) = time.time(), self._queue(queue)
        available = f"{IN_SESSION} AND state = {READY} AND due <= ?"
        ends = {
            "TTLExpiredException": ("expires <= ?", now),
            "MaxDeliveryCountExceeded": ("delivery_count >= ?", settings.max_delivery_count),
        }
        for reason, (condition, limit) in ends.items():
            for row in self.rows(f"{available} AND {condition}", queue_id, session_id, now, limit):
                self._changed("UPDATE message SET state = ? WHERE sequence_number = ?", (LOCKED, row.sequence_number))
                self.dead_letter(queue, row._replace(state=LOCKED).lock, reason, "It was not settled before.", now)

        in_order = f"{available} ORDER BY due, sequence_number LIMIT ?"
        rows = self.rows(in_order, queue_id, session_id, now, max_message_count)
        until = self.session_locks[queue][session_id].locked_until
        sql = "UPDATE message SET state = ?, due = ?, delivery_count = delivery_count + 1 WHERE sequence_number = ?"
        self.sql.executemany(sql, [(LOCKED, until, row.sequence_number) for row in rows])
        locked = [row._replace(state=LOCKED, due=until, delivery_count=row.delivery_count + 1) for row in rows]
        return [(row.lock, for_receiver(row, now)) for row in locked]

    def release_session(self, queue: str, session_id: str, counted: bool) -> None:
        """Let others have a session, and what was received of it and not settled, counted as delivered or not."""
        del self.session_locks[queue][session_id]
        given_back = "state = ?, due = enqueued_time, delivery_count = delivery_count - ?"
        sql = f"UPDATE message SET {given_back} WHERE {IN_SESSION} AND state = ?"
        self.sql.execute(sql, (READY, 0 if counted else 1, self._queue(queue)[0], session_id, LOCKED))

    def next_change(self, queue: str, now: float) -> float | None:
        """When a message of the queue becomes due, or the lock of one of its sessions ends."""
        sql = "SELECT min(due) FROM message WHERE queue_id = ? AND state = ? AND due > ?"
        (due,) = self._one(sql, (self._queue(queue)[0], READY, now))
        ends = [lock.locked_until for lock in self.session_locks[queue].values()]
        return min(ends if due is None else [*ends, due], default=None)


# --- Nodes: tokens and management -------------------------------------------------------------------------------------


def check_token(token: str, key: str) -> str:
    """The path that a shared access signature gives access to; a Refusal if it is not ours or too old."""
    scheme, _, parameters = token.partition(" ")
    given = dict(urllib.parse.parse_qsl(parameters))
    if scheme != "SharedAccessSignature" or not {"sr", "sig", "se", "skn"} <= given.keys():
        raise Refusal("amqp:unauthorized-access", "InvalidToken: this is not a shared access signature.")
    signed = f"{urllib.parse.quote_plus(given['sr'])}\n{given['se']}".encode()
    signature = base64.b64encode(hmac.digest(key.encode(), signed, "sha256"))
    if given["skn"] != KEY_NAME or not hmac.compare_digest(signature, given["sig"].encode()):
        raise Refusal("amqp:unauthorized-access", "InvalidSignature: The token has an invalid signature.")
    if float(given["se"]) <= time.time():
        raise Refusal("amqp:unauthorized-access", "ExpiredToken: The token is expired.")
    return path_of(given["sr"])


def path_of(address: str) -> str:
    """The path of an address, which may come with a scheme and a host."""
    return (urllib.parse.urlsplit(address).path if "://" in address else address).strip("/")


# An operation takes the queue and the body of a request; it returns the body of the answer, None for "nothing there".
Body = dict[str, Any]
Operation = Callable[[Broker, str, Body], Body | None]


def renew_lock(broker: Broker, queue: str, body: Body) -> Body:
    duration, locks = broker.settings.lock_duration, [Lock.of_token(token) for token in body["lock-tokens"]]
    now = [broker.hold(lock) for lock in locks][-1]
    for lock in locks:
        broker.renew(lock, duration, now)
    until = proton.timestamp((now + duration) * 1000)
    return {"expirations": array(proton.Data.TIMESTAMP, [until] * len(locks))}


def update_disposition(broker: Broker, queue: str, body: Body) -> Body:
    reason, description = body.get("deadletter-reason") or "", body.get("deadletter-description") or ""
    locks = [Lock.of_token(token) for token in body["lock-tokens"]]
    for lock in locks:
        broker.hold(lock)
    for lock in locks:
        broker.let_go(queue, lock, body["disposition-status"], reason, description, body.get("properties-to-modify"))
    return {}


def schedule_message(broker: Broker, queue: str, body: Body) -> Body:
    numbers = broker.send(queue, [bytes(item["message"]) for item in body["messages"]])
    return {"sequence-numbers": array(proton.Data.LONG, numbers)}


def cancel_scheduled_message(broker: Broker, queue: str, body: Body) -> Body:
    now = time.time()
    scheduled = {row.sequence_number for row in broker.numbered(body["sequence-numbers"]) if row.due > now}
    for number in body["sequence-numbers"]:
        if number not in scheduled:
            raise message_not_found(number)
    for number in body["sequence-numbers"]:
        if not broker.cancel(queue, number, now):
            raise message_not_found(number)
    return {}


def peek_message(broker: Broker, queue: str, body: Body) -> Body | None:
    most = min(body["message-count"], MOST_PEEKED)
    rows = broker.peek_rows(queue, most, body["from-sequence-number"], body.get("session-id"))
    return {"messages": [{"message": for_receiver(row, time.time())} for row in rows]} if rows else None


def receive_by_sequence_number(broker: Broker, queue: str, body: Body) -> Body:
    now = time.time()
    for number in body["sequence-numbers"]:
        if not broker.claim_deferred(queue, number, body.get("session-id"), now):
            raise message_not_found(number)
    rows = broker.numbered(body["sequence-numbers"])
    if body["receiver-settle-mode"] == proton.Link.RCV_FIRST:  # receive and delete
        broker.complete([row.lock for row in rows])
    return {"messages": [{"lock-token": row.lock.token, "message": for_receiver(row, now)} for row in rows]}


def renew_session_lock(broker: Broker, queue: str, body: Body) -> Body:
    return {"expiration": proton.timestamp(broker.renew_session(queue, body["session-id"], time.time()) * 1000)}


def get_session_state(broker: Broker, queue: str, body: Body) -> Body:
    return {"session-state": broker.session_states.get((queue, body["session-id"]))}


def set_session_state(broker: Broker, queue: str, body: Body) -> Body:
    key, state = (queue, body["session-id"]), body["session-state"]
    limit = broker.settings.max_message_bytes
    if state is None:
        broker.session_states.pop(key, None)
    elif len(state) > limit:
        text = f"The state of session '{key[1]}' (size: {len(state)} bytes) exceeds the limit ({limit} bytes)."
        raise Refusal("amqp:link:message-size-exceeded", text)
    else:
        broker.session_states[key] = bytes(state)
    return {}


def message_not_found(sequence_number: int) -> Refusal:
    return Refusal("com.microsoft:message-not-found", f"There is no message with the number {sequence_number}.")


def array(kind: int, values: Iterable[int]) -> proton.Array:
    undescribed: Any = proton.UNDESCRIBED
    return proton.Array(undescribed, kind, *values)


SETTLE = "com.microsoft:update-disposition"
PEEK = "com.microsoft:peek-message"
OPERATIONS: Mapping[str, Operation] = {
    SETTLE: update_disposition,
    "com.microsoft:schedule-message": schedule_message,
    "com.microsoft:cancel-scheduled-message": cancel_scheduled_message,
    "com.microsoft:renew-lock": renew_lock,
    PEEK: peek_message,
    "com.microsoft:receive-by-sequence-number": receive_by_sequence_number,
    "com.microsoft:renew-session-lock": renew_session_lock,
    "com.microsoft:get-session-state": get_session_state,
    "com.microsoft:set-session-state": set_session_state,
}


def execute(broker: Broker, queue: str, operation: str, body: Body, receiver: str | None) -> Body | None:
    """Do it, for the receiver whose link has that name: what is asked of a session, only its holder may, but peek."""
    if operation not in OPERATIONS:
        raise Refusal("amqp:not-implemented", f"The operation '{operation}' is not known here.")
    try:
        if operation != PEEK and "session-id" in body:
            broker.hold_session(queue, body["session-id"], receiver)
        return OPERATIONS[operation](broker, queue, body)
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal("amqp:decode-error", f"{operation}: {error!r}") from error


# --- Connections ------------------------------------------------------------------------------------------------------


class Wire(asyncio.Protocol):
    """One client's connection. The engine turns bytes into events; a method `on_...` handles each kind."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.broker = service.broker
        self.granted: set[str] = set()  # paths that tokens were put for
        self.locks: dict[Lock, str] = {}  # what was delivered over this connection, with its queue
        self.frozen = False
        self.links: dict[str, Any] = {}  # by name; each knows its queue, its node or its session
        self.collector = proton.Collector()
        self.connection = proton.Connection()
        self.connection.container = "servicebus-emulator"
        self.connection.collect(self.collector)
        self.engine = proton.Transport(proton.Transport.SERVER)
        self.engine.max_frame_size = MAX_FRAME_BYTES
        self.engine.sasl().allowed_mechs("ANONYMOUS")  # tokens tell who may do what
        self.engine.bind(self.connection)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.socket = transport
        self.service.wires.add(self)

    def data_received(self, data: bytes) -> None:
        if not self.frozen:
            self.service.turn(lambda: self.feed(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client. What it has received stays locked until the locks expire, but for sessions and a fault."""
        self.service.wires.discard(self)
        for link in list(self.links.values()):
            self.forget(link)
        # In a turn of its own, as this may be in the middle of another. It gives back the sessions, fault or no fault.
        asyncio.get_running_loop().call_soon(self.service.turn, self.unlock)

    def unlock(self) -> None:
        while self.locks and self.broker.faults.unlock:
            lock, queue = self.locks.popitem()
            with contextlib.suppress(Refusal):  # settled, or received by another
                self.broker.let_go(queue, lock, "abandoned")

    def drop(self) -> None:
        self.connection_lost(None)
        self.socket.abort()

    def feed(self, data: bytes) -> None:
        while data and (capacity := self.engine.capacity()) > 0:
            self.engine.push(data[:capacity])
            data = data[capacity:]
            self.handle_events()

    def handle_events(self) -> None:
        handler: Any = self
        while event := self.collector.peek():
            event.dispatch(handler)
            self.collector.pop()

    def flush(self) -> None:
        while (pending := self.engine.pending()) > 0:
            self.socket.write(bytes(self.engine.peek(pending) or b""))
            self.engine.pop(pending)
        self.handle_events()
        if pending < 0:  # the engine has said its last word
            self.socket.close()

    def open_too(self, event: Any) -> None:
        event.context.open()

    def close_too(self, event: Any) -> None:
        event.context.close()

    on_connection_remote_open = on_session_remote_open = open_too
    on_connection_remote_close = on_session_remote_close = close_too

    def on_link_remote_open(self, event: Any) -> None:
        link: Any = event.link
        path = path_of((link.remote_source if link.is_sender else link.remote_target).address or "")
        link.node = path if path == TOKEN_NODE or path.endswith(MANAGEMENT_SUFFIX) else None
        link.wire, link.queue, link.session_id = self, "", None
        link.is_outlet = link.is_sender and not link.node  # clients receive messages on it
        filters = filters_of(link.remote_source)
        with_session = link.is_outlet and SESSION_FILTER in filters
        try:
            if path != TOKEN_NODE:
                link.queue = self.authorized_queue(path.removesuffix(MANAGEMENT_SUFFIX))
            if link.is_outlet and with_session != (link.queue in self.broker.session_locks):
                kind, needs = ("sessionful", "does not require") if with_session else ("non-sessionful", "requires")
                text = f"A {kind} receiver cannot be created on an entity that {needs} sessions."
                raise Refusal("amqp:not-allowed", text)
        except Refusal as refusal:
            self.detach(link, refusal)
            return
        self.links[link.name] = link
        if link.is_outlet:
            self.service.outlets[link.queue].append(link)
        if with_session:  # it is attached when it gets a session, which may be at the end of this turn
            milliseconds = (link.remote_properties or {}).get(TIMEOUT) or DEFAULT_TIMEOUT
            link.wanted, link.deadline = filters[SESSION_FILTER], time.time() + milliseconds / 1000
            self.broker.stirred.add(link.queue)
        else:
            self.attach(link)

    def authorized_queue(self, path: str) -> str:
        if not any(f"{path}/".startswith(f"{granted}/") for granted in self.granted):
            raise Refusal("amqp:unauthorized-access", f"Unauthorized access: no token was put for '{path}'.")
        return self.broker.find(path)

    def attach(self, link: Any) -> None:
        link.source.copy(link.remote_source)
        link.target.copy(link.remote_target)
        if link.session_id is not None:
            until = self.broker.session_locks[link.queue][link.session_id].locked_until
            link.properties = {LOCKED_UNTIL: UNIX_EPOCH_TICKS + int(until * 10**7)}
            link.source.filter.clear()
            link.source.filter.put_object({SESSION_FILTER: link.session_id})
        link.snd_settle_mode, link.rcv_settle_mode = link.remote_snd_settle_mode, link.remote_rcv_settle_mode
        link.max_message_size = self.broker.settings.max_message_bytes
        link.open()
        if link.is_receiver:
            link.flow(SEND_CREDIT)

    def on_link_remote_close(self, event: Any) -> None:
        self.forget(event.link)
        event.link.close()

    on_link_remote_detach = on_link_remote_close

    def forget(self, link: Any) -> None:
        if self.links.pop(link.name, None) and link.is_outlet:
            self.service.outlets[link.queue].remove(link)
            lock = self.broker.session_locks.get(link.queue, {}).get(link.session_id)
            if lock is not None and not self.frozen:  # of a frozen connection nobody knows that it is of no use
                lock.given_back = True
                self.broker.stirred.add(link.queue)

    def detach(self, link: Any, refusal: Refusal) -> None:
        """Force a link off, or refuse it; the client may attach anew."""
        self.forget(link)
        if link.state & proton.Endpoint.LOCAL_UNINIT:
            # An attach without source and target announces a detach, which tells why.
            link.source.type = link.target.type = proton.Terminus.UNSPECIFIED
            link.open()
        link.condition = refusal.as_condition()
        link.close()

    def on_link_flow(self, event: Any) -> None:
        link: Any = event.link
        if link in self.service.outlets[link.queue]:
            self.broker.stirred.add(link.queue)
            if link.drain_mode:
                self.service.serve(link.queue)
                link.drained()

    def on_delivery(self, event: Any) -> None:
        delivery: Any = event.delivery
        link = delivery.link
        if link.name not in self.links or (link.is_sender and link.node):
            delivery.settle()  # the answer of a node was read, or the link was forced off meanwhile
        elif link.is_receiver:
            if delivery.readable and not delivery.partial:
                self.take(link, delivery)
        elif delivery.updated:
            if slow := self.broker.faults.slow:
                asyncio.get_running_loop().call_later(slow, self.service.turn, lambda: self.settle(link, delivery))
            else:
                self.settle(link, delivery)

    def take(self, link: Any, delivery: Any) -> None:
        encoded = bytes(link.recv(delivery.pending) or b"")
        link.advance()
        try:
            if link.node:
                self.respond(link, encoded)
            else:
                self.broker.send(link.queue, [encoded])
            answer(delivery, proton.Delivery.ACCEPTED)
        except Refusal as refusal:
            answer(delivery, proton.Delivery.REJECTED, refusal)
        if link.credit < SEND_CREDIT // 2:
            link.flow(SEND_CREDIT - link.credit)

    def respond(self, link: Any, encoded: bytes) -> None:
        """Do what a node is asked for, and answer on the link that comes from it."""
        request: Any = proton.Message()
        request.decode(encoded)
        given = request.properties or {}
        operation, receiver = given.get("operation"), given.get("associated-link-name")
        fields = TOKEN_FIELDS if link.node == TOKEN_NODE else MANAGEMENT_FIELDS
        status: tuple[Any, ...]  # the values of those, the last one if there is an error
        body = None
        try:
            if link.node == TOKEN_NODE:
                self.granted.add(check_token(str(request.body), self.broker.settings.key))
                status = proton.int32(202), "Accepted"
            else:
                body = execute(self.broker, link.queue, str(operation), request.body, receiver)
                status = proton.int32(204 if body is None else 200), "OK"
        except Refusal as refusal:
            status = proton.int32(refusal.status), refusal.description, proton.symbol(refusal.condition)
        properties: Body = dict(zip(fields, status, strict=False))
        if operation != SETTLE or not self.answer_is_lost():
            replies = [reply for reply in self.links.values() if reply.is_sender and reply.node == link.node]
            response = proton.Message(body, correlation_id=request.id, properties=properties)
            response.send(replies[-1], tag=uuid.uuid4().hex)

    def settle(self, link: Any, delivery: Any) -> None:
        state, refusal = delivery.remote_state, None
        self.locks.pop(delivery.lock, None)
        try:
            if link.session_id is not None:
                self.broker.hold_session(link.queue, link.session_id, link.name)
            self.broker.let_go(link.queue, delivery.lock, *outcome_of(delivery))
        except Refusal as lost:
            state, refusal = proton.Delivery.REJECTED, lost
        if not self.answer_is_lost() and link.name in self.links:
            answer(delivery, state, refusal)
            # Make the engine encode this answer, or it would make one frame of several. The service answers each
            # settlement by a frame of its own, and the SDK waits needlessly where fewer frames come.
            self.engine.pending()

    def answer_is_lost(self) -> bool:
        """Whether the answer to a settlement that was just applied is to be lost, and maybe the connection too."""
        if self.broker.faults.due("lose"):
            self.drop()
            return True
        return self.broker.faults.due("mute")


def filters_of(source: Any) -> Mapping[str, Any]:
    source.filter.rewind()
    return (source.filter.next() and source.filter.get_object()) or {}


def answer(delivery: Any, state: int, refusal: Refusal | None = None) -> None:
    """Settle a delivery in that state, which the client is told."""
    delivery.local.condition = refusal and refusal.as_condition()
    delivery.update(state)
    delivery.settle()


def outcome_of(delivery: Any) -> tuple[Any, ...]:
    """What the disposition that a client sent asks for: the status, for dead-lettering also why, and properties."""
    match delivery.remote_state:
        case proton.Delivery.ACCEPTED:
            return ("completed",)
        case proton.Delivery.REJECTED:
            given = (delivery.remote.condition and delivery.remote.condition.info) or {}
            info = {str(name): value for name, value in given.items()}
            reason, description = (info.pop(name, None) or "" for name in DEAD_LETTER_PROPERTIES)
            return "suspended", reason, description, info
        case proton.Delivery.MODIFIED:
            return ("defered" if delivery.remote.undeliverable else "abandoned",)
    return ("released",)


# --- Service ----------------------------------------------------------------------------------------------------------


class Service:
    """What connections share: the broker, the receivers that wait, the alarms, the port."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.wires: set[Wire] = set()
        self.outlets: dict[str, deque[Any]] = defaultdict(deque)  # the links on which clients receive, by queue
        self.alarms: dict[str, asyncio.TimerHandle] = {}

    def turn(self, act: Callable[[], object]) -> None:
        """Act, serve the receivers that wait, commit; only then let anything out."""
        with self.broker.transaction():
            act()
            while self.broker.stirred:
                self.serve(self.broker.stirred.pop())
        for wire in list(self.wires):
            wire.flush()

    def serve(self, queue: str) -> None:
        """Hand out what is available to the receivers of a queue, and set an alarm for what will be."""
        outlets = self.outlets[queue]
        if queue in self.broker.session_locks:
            self.serve_sessions(queue, outlets, time.time())
        else:
            outlets.rotate(-1)  # so that not always the same one is first
            for outlet in outlets:
                if outlet.credit:
                    for lock, encoded in self.broker.receive(queue, outlet.credit):
                        self.deliver(outlet, lock, encoded)
            if any(outlet.credit for outlet in outlets):
                self.set_alarm(queue, self.broker.next_due(queue))
        if self.outlets.get(queue + DEAD_LETTER_SUFFIX):
            self.serve(queue + DEAD_LETTER_SUFFIX)

    def serve_sessions(self, queue: str, outlets: Iterable[Any], now: float) -> None:
        """End the locks that are over, let who waits for a session have one, and hand out what is in those held."""
        for session_id, lock in list(self.broker.session_locks[queue].items()):
            if lock.given_back or lock.locked_until <= now:
                self.broker.release_session(queue, session_id, counted=not lock.given_back)
                for outlet in [each for each in outlets if each.session_id == session_id]:
                    outlet.wire.detach(outlet, session_lock_lost(session_id))
        for outlet in [each for each in outlets if each.session_id is None]:
            self.accept_session(outlet, now)
        for outlet in outlets:
            if outlet.session_id is not None and outlet.credit:
                for message_lock, encoded in self.broker.receive_in_session(queue, outlet.session_id, outlet.credit):
                    self.deliver(outlet, message_lock, encoded)
        moments = [outlet.deadline for outlet in outlets if outlet.session_id is None]
        if (change := self.broker.next_change(queue, now)) is not None:
            moments.append(change)
        self.set_alarm(queue, min(moments, default=None))

    def accept_session(self, outlet: Any, now: float) -> None:
        """Let a receiver have the session that it wants, or the next one; where that cannot be, tell it why."""
        session_id = self.broker.free_session(outlet.queue, now) if outlet.wanted is None else outlet.wanted
        if session_id in self.broker.session_locks[outlet.queue]:
            text = f"The requested session '{session_id}' cannot be accepted. It is locked by another receiver."
            outlet.wire.detach(outlet, Refusal("com.microsoft:session-cannot-be-locked", text))
        elif session_id is not None:
            self.broker.lock_session(outlet.queue, session_id, outlet.name, now)
            outlet.session_id = session_id
            outlet.wire.attach(outlet)
        elif outlet.deadline <= now:
            text = "The operation did not complete within the allotted timeout: no session was available."
            outlet.wire.detach(outlet, Refusal("com.microsoft:timeout", text))

    def deliver(self, outlet: Any, lock: Lock, encoded: bytes) -> None:
        delivery = outlet.delivery(lock.token.bytes_le)
        delivery.lock = lock
        if outlet.session_id is None:
            outlet.wire.locks[lock] = outlet.queue
        outlet.stream(encoded)
        outlet.advance()
        if outlet.snd_settle_mode == proton.Link.SND_SETTLED:  # receive and delete
            delivery.settle()
            self.broker.let_go(outlet.queue, lock, "completed")

    def set_alarm(self, queue: str, due: float | None) -> None:
        if alarm := self.alarms.pop(queue, None):
            alarm.cancel()
        if due is not None:
            loop = asyncio.get_running_loop()
            self.alarms[queue] = loop.call_later(max(due - time.time(), 0.001), self.stir, [queue])

    def stir(self, queues: Iterable[str]) -> None:
        """Serve the queues in a turn of their own."""
        self.turn(lambda: self.broker.stirred.update(queues))

    async def listen(self, port: int) -> None:
        self.server = await asyncio.get_running_loop().create_server(lambda: Wire(self), HOST, port)
        self.port = self.server.sockets[0].getsockname()[1]


# --- Control ----------------------------------------------------------------------------------------------------------


class Control:
    """Faults on demand: one command a line, answered by `ok`, by `error` and why, or by figures.

    The names of Faults are commands that set them; the others are the methods that begin with `do_`.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.broker = service.broker

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError, asyncio.CancelledError):  # a line too long; the end
            while line := await reader.readline():
                writer.write(f"{self.answer(line.decode(errors='replace'))}\n".encode())
                await writer.drain()
        writer.close()

    def answer(self, line: str) -> str:
        name, *arguments = line.split() or [""]
        try:
            if name in ("refuse", *vars(self.broker.faults)) and not all(0 <= float(text) < 1e9 for text in arguments):
                raise ValueError("numbers are from 0 to 1e9")
            if name in vars(self.broker.faults):
                (number,) = arguments
                setattr(self.broker.faults, name, float(number))
                return "ok"
            return getattr(self, f"do_{name}", self.unknown)(*arguments) or "ok"
        except (TypeError, ValueError) as error:
            return f"error: {line.strip()!r}: {error}"

    def unknown(self, *arguments: str) -> str:
        commands = [name.removeprefix("do_") for name in dir(self) if name.startswith("do_")]
        raise ValueError(f"the commands are {', '.join([*commands, *vars(self.broker.faults)])}")

    def do_drop(self) -> None:
        """Cut every connection."""
        for wire in list(self.service.wires):
            wire.drop()

    def do_refuse(self, seconds: str) -> None:
        """Accept no connection for that long."""
        if not self.service.server.is_serving():
            raise ValueError("connections are refused already")
        self.reopening = asyncio.create_task(self.reopen(float(seconds)))
        self.service.server.close()

    async def reopen(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.service.listen(self.service.port)

    def do_freeze(self) -> None:
        """Keep every connection up, and pass nothing on, as a firewall does that has forgotten it."""
        for wire in list(self.service.wires):
            wire.frozen = True
            wire.connection_lost(None)

    def do_detach(self) -> None:
        """Force every link off, as the service does with idle ones; connections stay."""
        idle = Refusal("amqp:link:detach-forced", "The link was detached by the broker: it was idle for too long.")
        for wire in self.service.wires:
            self.detach_all(wire, idle)
        self.service.stir(())

    def do_expire(self) -> None:
        """Let the tokens of every connection end, on which the service forces all links off."""
        expired = Refusal("amqp:unauthorized-access", "TokenExpired: The token is expired.")
        for wire in self.service.wires:
            wire.granted.clear()
            self.detach_all(wire, expired)
        self.service.stir(())

    def detach_all(self, wire: Wire, refusal: Refusal) -> None:
        for link in list(wire.links.values()):
            if link.node != TOKEN_NODE:  # without its tokens a connection could do nothing more
                wire.detach(link, refusal)

    def do_steal(self, what: str) -> None:
        """Take the lock of one sequence number, or of one session, away, or `all` locks."""
        sessions = [each for locks in self.broker.session_locks.values() for each in locks.items()]
        held = [lock for session_id, lock in sessions if what in ("all", session_id)]
        for lock in held:
            lock.locked_until = 0
        with self.broker.transaction():
            locked = [row for row in self.broker.rows("state = ?", LOCKED) if what in ("all", str(row.sequence_number))]
            for row in locked:
                self.broker.abandon(row.lock)
        self.service.stir(self.broker.names.values())
        if not locked and not held:
            raise ValueError(f"nothing is locked: {what}")

    def do_stats(self) -> str:
        """Connections, links, sessions that are held, and messages by their state, as JSON."""
        links = [len(wire.links) for wire in self.service.wires]
        sessions = sum(map(len, self.broker.session_locks.values()))
        figures = {"connections": len(links), "links": sum(links), "sessions": sessions}
        with self.broker.transaction():
            return json.dumps(figures | self.broker.counts(time.time()))


# --- Embedding --------------------------------------------------------------------------------------------------------


class ServiceBusEmulator:
    """An emulator in a child process, which ends with the `with` block, or with this process.

    The options are those of the command line; of one that may be repeated, a list.
    """

    def __init__(self, queues: Iterable[str] = ("tasks",), *, port: int = 0, **options: object) -> None:
        given = {"queue": list(queues), "port": port, **options}
        self.arguments = [
            f"--{name.replace('_', '-')}={value}"
            for name, values in given.items()
            for value in (values if isinstance(values, list) else [values])
            if value is not None
        ]

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "examples.servicebus_emulator", "--until-eof", *self.arguments]
        root = Path(__file__).resolve().parent.parent
        self.process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        self.connection_string = self.process.stdout.readline().strip()
        host, _, port = self.process.stdout.readline().strip().rpartition(" ")[2].partition(":")
        if not port:
            raise RuntimeError(f"the emulator did not start: {' '.join(command)}")
        self.control_address = (host, int(port))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=10)

    def control(self, command: str) -> dict[str, int]:
        """Give one command of Control; the figures for `stats`, else nothing. ValueError if it was refused."""
        with socket.create_connection(self.control_address, timeout=10) as connection:
            connection.sendall(f"{command}\n".encode())
            line = connection.makefile().readline().strip()
        if line.startswith("error"):
            raise ValueError(line)
        return dict(json.loads(line)) if line.startswith("{") else {}


# --- Command line -----------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="servicebus_emulator", description="A local Azure Service Bus.")
    parser.add_argument("--queue", action="append", required=True, help="a queue to serve; may be repeated")
    parser.add_argument(
        "--session-queue", action="append", default=[], help="one that requires sessions; may be repeated"
    )
    parser.add_argument("--port", type=int, default=5672, help="0 for any that is free")
    parser.add_argument("--control-port", type=int, default=0, help="for faults on demand; 0 for any that is free")
    parser.add_argument("--key", default=KEY, help=f"the key of {KEY_NAME}")
    parser.add_argument("--lock-duration", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--max-delivery-count", type=int, default=10, metavar="N")
    parser.add_argument("--duplicate-detection", type=float, metavar="SECONDS", help="the window; off by default")
    parser.add_argument("--time-to-live", type=float, metavar="SECONDS", help="off by default")
    parser.add_argument("--max-message-bytes", type=int, default=262144, metavar="BYTES")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does or says anything")
    given = parser.parse_args()
    for name in ("lock_duration", "max_delivery_count", "duplicate_detection", "time_to_live", "max_message_bytes"):
        if (number := getattr(given, name)) is not None and not 0 < number < 2**31:
            parser.error(f"argument --{name.replace('_', '-')}: {number} is not above 0 and below 2**31")
    if not all(given.queue + given.session_queue):
        parser.error("argument --queue: a queue needs a name")
    return given


async def serve(given: argparse.Namespace) -> None:
    service = Service(Broker(given))
    control = await asyncio.start_server(Control(service).serve, HOST, given.control_port)
    await service.listen(given.port)
    credential = f"SharedAccessKeyName={KEY_NAME};SharedAccessKey={given.key}"
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if given.until_eof:
        loop.add_reader(sys.stdin, stop.set)
    print(f"Endpoint=sb://{HOST}:{service.port};{credential};UseDevelopmentEmulator=true;")
    print(f"control: {HOST}:{control.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()


if __name__ == "__main__":
    try:
        asyncio.run(serve(options()))
    except (OSError, OverflowError) as error:  # a port that is taken, or too large
        sys.exit(f"servicebus_emulator: error: {error}; --port 0 takes any that is free")
