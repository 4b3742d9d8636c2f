"""The latency of `GET /health`, asked by a process that does nothing else: `python health_probe.py http://127.0.0.1:8000`.

It asks twenty times a second, each time over a new connection, until its standard input is closed, and then prints the
latencies in seconds as a JSON list. An answer that is not 200 counts as infinite. Only the standard library is used, so
that neither an event loop nor the work of other clients is measured.
"""

import http.client
import json
import select
import sys
import time

PERIOD = 0.05


def main() -> None:
    host = sys.argv[1].removeprefix("http://")
    seconds: list[float] = []
    while not select.select([sys.stdin], [], [], PERIOD)[0]:
        begun = time.perf_counter()
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/health")
        ok = connection.getresponse().status == 200
        connection.close()
        seconds.append(time.perf_counter() - begun if ok else float("inf"))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
