"""A Flight server in a process of its own: python flight_server.py FOLDER; what it does is in FOLDER/flight.json."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight


def table(begin, end):
    rows = range(begin, end)
    kind = pa.array([f"kind {i % 3}" for i in rows], pa.string()).dictionary_encode()
    x = pa.FixedSizeListArray.from_arrays(pa.array([i % 1000 for i in rows for _ in range(4)], pa.float32()), 4)
    note = pa.array([None if i % 7 == 0 else f"note {i}" for i in rows], pa.string())
    return pa.table({"i": pa.array(rows, pa.int64()), "x": x, "note": note, "kind": kind})


class Guard(flight.ServerMiddlewareFactory):
    def __init__(self, token, folder):
        self.token, self.folder = token, folder

    def start_call(self, info, headers):
        told = [value for key, values in headers.items() if key.lower() == "authorization" for value in values]
        with (self.folder / "tokens").open("a") as file:
            file.write(f"{told}\n")
        if self.token and told != [f"Bearer {self.token}"]:
            raise flight.FlightUnauthenticatedError("who are you")


class Rows(flight.FlightServerBase):
    def __init__(self, folder, says, **how):
        super().__init__(middleware={"guard": Guard(says.get("token"), folder)}, **how)
        self.folder, self.ends, self.calls = folder, says["ends"], 0
        self.lock = threading.Lock()

    def mood(self):
        return json.loads((self.folder / "flight.json").read_text())

    def get_flight_info(self, context, descriptor):
        asked = descriptor.path[0].decode() if descriptor.path else descriptor.command.decode()
        if asked not in ("rows", "select rows"):
            raise KeyError(f"there is no {asked}")
        mood, bounds = self.mood(), zip([0, *self.ends], self.ends)
        tickets = [json.dumps({"begin": b, "end": e, "round": mood.get("round", 0)}) for b, e in bounds]
        endpoints = [flight.FlightEndpoint(t.encode(), mood.get("elsewhere", [])) for t in tickets]
        return flight.FlightInfo(table(0, 1).schema, descriptor, endpoints, -1, -1)

    def do_get(self, context, ticket):
        asked, mood = json.loads(ticket.ticket), self.mood()
        if asked["round"] != mood.get("round", 0):
            raise KeyError("this ticket has run out")
        with self.lock:
            self.calls += 1
            count = self.calls
            with (self.folder / "calls").open("a") as file:
                file.write(f"{asked['begin']}\n")
        rows = table(asked["begin"], asked["end"])
        if count <= mood.get("breaks", 0):

            def broken():
                yield from rows.to_batches(max_chunksize=100)[:1]
                raise flight.FlightUnavailableError("going down")

            return flight.GeneratorStream(rows.schema, broken())
        return flight.RecordBatchStream(pa.Table.from_batches(rows.to_batches(max_chunksize=300), rows.schema))


def main():
    folder = Path(sys.argv[1])
    says = json.loads((folder / "flight.json").read_text())
    how = {"location": f"grpc{'+tls' if 'certificate' in says else ''}://127.0.0.1:0"}
    if "certificate" in says:
        pair = (Path(says["certificate"]).read_bytes(), Path(says["key"]).read_bytes())
        how |= {"tls_certificates": [pair]}
    server = Rows(folder, says, **how)
    print(server.port, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
    server.serve()


if __name__ == "__main__":
    main()
