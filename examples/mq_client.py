"""Ask the platform for work through its message queue and wait for the result message.

It needs only the queue file of a running platform, no gateway and no key:

    python examples/mq_client.py aigc-state/queue.db GC text_to_image '{"prompt": "a red circle"}' --priority 100
    python examples/mq_client.py aigc-state/queue.db TP dreambooth '{"pictures": ["<file id>", ...], "category": "dog"}'

The result's parameters are printed as JSON. The exit code is 0 when the work finished, 1 when it did not, 2 when no result came in
time.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from pathlib import Path

from api.mq.messages import MessageRefused, decode, encode_request, request_id, result_id
from api.mq.port import REQUESTS, RESULTS
from api.mq.sqlite import SqliteQueue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("queue", type=Path, help="queue.db in the platform's state directory")
    parser.add_argument("task_type", choices=["TP", "GC"])
    parser.add_argument("method", help="text_to_image, dreambooth, deploy, undeploy or sleep")
    parser.add_argument("parameters", type=json.loads, help="a JSON object")
    parser.add_argument("--req-no", default=str(uuid.uuid4()), help="the same number again is the same request")
    parser.add_argument("--tenant", default="default")
    parser.add_argument("--group", default="")
    parser.add_argument("--priority", type=int, default=0, help="100 and above is urgent")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for the result")
    asked = parser.parse_args()
    if not asked.queue.is_file():
        parser.error(f"{asked.queue} does not exist; give the queue.db of a running platform")

    queue = SqliteQueue(asked.queue)
    try:
        body = encode_request(
            req_no=asked.req_no,
            task_type=asked.task_type,
            method=asked.method,
            parameters=asked.parameters,
            tenant=asked.tenant,
            group=asked.group,
            priority=asked.priority,
        )
        # When this returns, the request is on disk and will be answered, whatever falls over.
        queue.put(REQUESTS, request_id(asked.tenant, asked.req_no), body, asked.priority)
        print(f"asked for {asked.method} as {asked.req_no}", file=sys.stderr)

        delivery = queue.claim(RESULTS, result_id(asked.tenant, asked.req_no), wait_s=asked.timeout)
        if delivery is None:
            print(f"no result within {asked.timeout:g} s; run again with --req-no {asked.req_no}", file=sys.stderr)
            return 2
        result = decode(delivery.body).body.parameters
        print(json.dumps(result, indent=2))
        queue.ack([delivery])  # only now: before, a crash of this program would lose the answer
        return 0 if result["state"] == "finished" else 1
    except MessageRefused as refused:
        parser.error(str(refused))
    finally:
        queue.close()


if __name__ == "__main__":
    sys.exit(main())
