-- A queue file of schema version 1: dead letters, a chain that is locked, one that is scheduled, one for another
-- queue, one that waits. Read by the test that migrates it.
PRAGMA application_id = 1112492364;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE duplicate (
        queue_id        INTEGER NOT NULL,
        message_id      TEXT NOT NULL,
        expires         REAL NOT NULL,
        sequence_number INTEGER NOT NULL,
        PRIMARY KEY (queue_id, message_id)
    ) WITHOUT ROWID;
INSERT INTO "duplicate" VALUES(1,'01a213f5-ad7a-778c-addb-07e605d8a3ef',1.80563119756764292721e+09,1);
INSERT INTO "duplicate" VALUES(1,'01a213f5-ad81-7026-8c34-ee67968afc27',1.80563119756938219064e+09,2);
INSERT INTO "duplicate" VALUES(1,'01a213f5-ad82-7f15-a63c-f65d4d762cbc',1.80563119757082438466e+09,3);
INSERT INTO "duplicate" VALUES(1,'01a213f5-ad82-7f15-a63c-f65d4d762cbc:1',1.80563119757987737652e+09,4);
INSERT INTO "duplicate" VALUES(1,'01a213f5-ad82-7f15-a63c-f65d4d762cbc:2',1.80563119758123230926e+09,5);
INSERT INTO "duplicate" VALUES(1,'01a213f5-ad90-7bc3-a6aa-d32b909f436d',1.80563119758524703983e+09,6);
INSERT INTO "duplicate" VALUES(1,'01a213f5-ad92-7380-9164-53b19a53bb86',1.80563119758719110487e+09,7);
INSERT INTO "duplicate" VALUES(1,'01a213f5-ad96-7504-807c-51c9b52cf1e0',1.80563119759110951422e+09,9);
CREATE TABLE message (
        sequence_number               INTEGER PRIMARY KEY AUTOINCREMENT,
        queue_id                      INTEGER NOT NULL,
        state                         INTEGER NOT NULL,
        due                           REAL NOT NULL,
        delivery_count                INTEGER NOT NULL DEFAULT 0,
        enqueued_time                 REAL NOT NULL,
        scheduled_enqueue_time        REAL,
        expires                       REAL,
        message_id                    TEXT,
        body                          NOT NULL,
        application_properties        TEXT,
        dead_letter_reason            TEXT,
        dead_letter_error_description TEXT
    );
INSERT INTO "message" VALUES(1,2,1,1.79563119757987737657e+09,1,1.79563119756764292718e+09,NULL,NULL,'01a213f5-ad7a-778c-addb-07e605d8a3ef','{"task_id":"01a213f5-ad7a-778c-addb-07e605d8a3ef","function_name":"divide","payload":{"args":[1,0],"kwargs":{}},"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"attempts":{"attempts":0,"last_retry":"2026-11-25T18:26:37.562549+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"on_success":null,"on_failure":null}',NULL,'TaskFailed','ZeroDivisionError: division by zero');
INSERT INTO "message" VALUES(2,2,1,1.79563119757987737657e+09,1,1.79563119756938219069e+09,NULL,NULL,'01a213f5-ad81-7026-8c34-ee67968afc27','{"task_id":"01a213f5-ad81-7026-8c34-ee67968afc27","function_name":"unknown","payload":{"args":[1],"kwargs":{}},"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"attempts":{"attempts":0,"last_retry":"2026-11-25T18:26:37.569182+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"policy_is_default":true,"default_options":["should_dead_letter","acks_late"],"on_success":null,"on_failure":null}',NULL,'UnregisteredFunction','boilermaker.UsageError: ''unknown'' is not registered: import its module before run().');
INSERT INTO "message" VALUES(5,2,1,1.79563119758272051809e+09,1,1.79563119758123230932e+09,NULL,NULL,'01a213f5-ad82-7f15-a63c-f65d4d762cbc:2','{"task_id":"01a213f5-ad82-7f15-a63c-f65d4d762cbc","function_name":"fetch","payload":{"args":["https://example.com/"],"kwargs":{}},"policy":{"max_tries":3,"delay":0,"delay_max":3600,"retry_mode":0},"attempts":{"attempts":2,"last_retry":"2026-11-25T18:26:37.580762+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"on_success":null,"on_failure":null}',NULL,'RetriesExhausted','boilermaker.RetryException: again');
INSERT INTO "message" VALUES(6,1,0,1.79563120758959770205e+09,1,1.79563119758524703979e+09,NULL,NULL,'01a213f5-ad90-7bc3-a6aa-d32b909f436d','{"task_id":"01a213f5-ad90-7bc3-a6aa-d32b909f436d","function_name":"resize","payload":{"args":["cat.png"],"kwargs":{}},"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"attempts":{"attempts":0,"last_retry":"2026-11-25T18:26:37.585004+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"on_success":{"task_id":"01a213f5-ad91-7f8d-b2e4-56b515faa5a5","function_name":"store","payload":{"args":[],"kwargs":{}},"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"attempts":{"attempts":0,"last_retry":"2026-11-25T18:26:37.585004+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"takes_result":true,"on_success":null,"on_failure":null},"on_failure":null}',NULL,NULL,NULL);
INSERT INTO "message" VALUES(7,1,1,3.79563119758701896671e+09,0,3.79563119758701896671e+09,3.79563119758701896671e+09,NULL,'01a213f5-ad92-7380-9164-53b19a53bb86','{"task_id":"01a213f5-ad92-7380-9164-53b19a53bb86","function_name":"resize","payload":{"args":["later.png"],"kwargs":{}},"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"attempts":{"attempts":0,"last_retry":"2026-11-25T18:26:37.587001+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"on_success":null,"on_failure":null}',NULL,NULL,NULL);
INSERT INTO "message" VALUES(8,3,1,1.79563119758829832072e+09,0,1.79563119758829832072e+09,NULL,NULL,'01a213f5-ad94-74ff-a26f-99d55b422bf8','{"task_id":"01a213f5-ad94-74ff-a26f-99d55b422bf8","function_name":"send","payload":{"args":["ann@example.com"],"kwargs":{}},"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"attempts":{"attempts":0,"last_retry":"2026-11-25T18:26:37.588031+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"policy_is_default":true,"default_options":["should_dead_letter","acks_late"],"on_success":{"task_id":"01a213f5-ad93-7560-9ee3-8f2ef4d17333","function_name":"store","payload":{"args":[],"kwargs":{}},"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"attempts":{"attempts":0,"last_retry":"2026-11-25T18:26:37.587996+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"takes_result":true,"queue":"tasks","on_success":null,"on_failure":null},"on_failure":null}',NULL,NULL,NULL);
INSERT INTO "message" VALUES(9,1,1,1.79563119759110951427e+09,0,1.79563119759110951427e+09,NULL,NULL,'01a213f5-ad96-7504-807c-51c9b52cf1e0','{"task_id":"01a213f5-ad96-7504-807c-51c9b52cf1e0","function_name":"resize","payload":{"args":["dog.png"],"kwargs":{"width":100}},"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"attempts":{"attempts":0,"last_retry":"2026-11-25T18:26:37.590784+00:00"},"should_dead_letter":true,"acks_late":true,"graph_id":null,"on_success":null,"on_failure":null}',NULL,NULL,NULL);
CREATE TABLE queue (
        queue_id            INTEGER PRIMARY KEY,
        name                TEXT NOT NULL UNIQUE,
        max_delivery_count  INTEGER,
        duplicate_detection REAL,
        time_to_live        REAL
    );
INSERT INTO "queue" VALUES(1,'tasks',10,10000000.0,NULL);
INSERT INTO "queue" VALUES(2,'tasks/$DeadLetterQueue',NULL,NULL,NULL);
INSERT INTO "queue" VALUES(3,'mailer',10,NULL,NULL);
CREATE INDEX message_due ON message (queue_id, state, due);
CREATE INDEX duplicate_expires ON duplicate (queue_id, expires);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('message',9);
COMMIT;
