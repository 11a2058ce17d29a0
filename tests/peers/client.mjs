// A client of /ws without code of pathmeter: Node's ws. Prints one JSON object per line.
//
// client.mjs URL echo SIZE…     counts of messages, and the sizes whose echo differed
// client.mjs URL codes LIMIT    close codes of several connections
// client.mjs URL stay PINGS     "ready" after PINGS pings, then the agent's close code
// client.mjs URL origin ORIGIN  status of an upgrade from a page of ORIGIN, 101 if accepted
//
// $PATHMETER_NODE_WS is the folder of the package.
import { createRequire } from "node:module";
import { once } from "node:events";

const WebSocket = createRequire(import.meta.url)(process.env.PATHMETER_NODE_WS);
const report = (result) => console.log(JSON.stringify(result));

async function open(url) {
  const socket = new WebSocket(url);
  await once(socket, "open");
  return socket;
}

function messages(size) {
  const text = Buffer.from(('{"seq": 123, "ts": 1678886400100}' + "é".repeat(size)).slice(0, size)).subarray(0, size);
  // A text must not end within a character.
  const whole = text.at(-1) === 0xc3 ? Buffer.concat([text.subarray(0, -1), Buffer.from("e")]) : text;
  return [[whole, false], [Buffer.from(Array.from({ length: size }, (_, at) => at % 256)), true]];
}

async function echo(url, sizes) {
  const socket = await open(url);
  let [sent, payload, wrong] = [0, 0, []];
  for (const size of sizes.map(Number)) {
    for (const [message, binary] of messages(size)) {
      for (const fragments of [1, 7]) {
        const answer = once(socket, "message");
        const step = Math.ceil(message.length / fragments) || 1;
        for (let at = 0; at === 0 || at < message.length; at += step) {
          socket.send(message.subarray(at, at + step), { binary, fin: at + step >= message.length });
        }
        const [back, isBinary] = await answer;
        sent += 1;
        payload += message.length;
        if (isBinary !== binary || !message.equals(back)) wrong.push(size);
      }
    }
  }
  const ponged = once(socket, "pong");
  socket.ping("are you there");
  const [pong] = await ponged;
  socket.close();
  await once(socket, "close");
  report({ sent, payload, wrong, pong: pong.toString() === "are you there" });
}

async function closedBy(url, act) {
  const socket = await open(url);
  socket.on("error", () => {});
  const closed = once(socket, "close");
  act(socket);
  return (await closed)[0];
}

async function codes(url, limit) {
  const bytes = (size) => Buffer.alloc(size, "x");
  report({
    too_large: await closedBy(url, (socket) => socket.send(bytes(limit + 1))),
    far_too_large: await closedBy(url, (socket) => socket.send(bytes(limit * 8))),
    fragments_too_large: await closedBy(url, (socket) => {
      socket.send(bytes(limit), { fin: false });
      socket.send(bytes(1));
    }),
    no_text: await closedBy(url, (socket) => socket.send(Buffer.from([0xff, 0xfe]), { binary: false })),
    normal: await closedBy(url, (socket) => socket.close(1000)),
    own: await closedBy(url, (socket) => socket.close(4321, "why not")),
  });
}

async function stay(url, pings) {
  const socket = await open(url);
  const closed = once(socket, "close");
  while (pings-- > 0) await once(socket, "ping");
  const answer = once(socket, "message");
  socket.send("here");
  report({ ready: (await answer)[0].toString() === "here" });
  report({ code: (await closed)[0] });
}

async function origin(url, from) {
  const socket = new WebSocket(url, { origin: from });
  socket.on("error", () => {});
  socket.on("unexpected-response", (request, response) => {
    report({ status: response.statusCode });
    request.destroy();
  });
  socket.on("open", () => {
    report({ status: 101 });
    socket.close();
  });
}

const [url, what, ...rest] = process.argv.slice(2);
await { echo: () => echo(url, rest), codes: () => codes(url, Number(rest[0])), stay: () => stay(url, Number(rest[0])), origin: () => origin(url, rest[0]) }[what]();
