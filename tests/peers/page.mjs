// Measures as a web page does, with browser APIs only. Prints one JSON object.
//
//   page.mjs URL COUNT [INTERVAL_MS]
//
// Each message is {"seq": …, "ts": …}. Jitter is computed as in RFC 3550 section 6.4.1, over the round trips
// of replies in order of arrival. Without a global WebSocket it uses that of $PATHMETER_NODE_WS.
import { createRequire } from "node:module";

const WebSocket = globalThis.WebSocket ?? createRequire(import.meta.url)(process.env.PATHMETER_NODE_WS);
const [url, count, interval = "100"] = process.argv.slice(2);
// Longer than any reply takes; messages without a reply by then are lost.
const REPLY_TIMEOUT_MS = 20_000;

const sent = new Map();
const rtts = [];
let [identical, unsolicited, jitter, seq] = [0, 0, 0, 0];

const socket = new WebSocket(url);
socket.onerror = (event) => {
  console.error(event.message ?? "no connection");
  process.exit(1);
};
socket.onmessage = ({ data }) => {
  const now = performance.now();
  const request = sent.get(JSON.parse(data).seq);
  if (!request || request.answered) return void (unsolicited += 1);
  request.answered = true;
  if (data === request.text) identical += 1;
  const rtt = now - request.at;
  if (rtts.length > 0) jitter += (Math.abs(rtt - rtts.at(-1)) - jitter) / 16;
  rtts.push(rtt);
  if (rtts.length === Number(count)) finish();
};
socket.onopen = () => {
  const timer = setInterval(() => {
    const text = JSON.stringify({ seq, ts: Date.now() });
    sent.set(seq++, { text, at: performance.now() });
    socket.send(text);
    if (seq === Number(count)) {
      clearInterval(timer);
      setTimeout(finish, REPLY_TIMEOUT_MS).unref?.();
    }
  }, Number(interval));
};

function finish() {
  const sorted = rtts.toSorted((a, b) => a - b);
  const sum = rtts.reduce((all, rtt) => all + rtt, 0);
  console.log(JSON.stringify({
    sent: sent.size,
    received: rtts.length,
    identical,
    unsolicited,
    lost: sent.size - rtts.length,
    loss: (sent.size - rtts.length) / sent.size,
    rtt_ms: { min: sorted[0], mean: sum / sorted.length, median: sorted[sorted.length >> 1], max: sorted.at(-1) },
    jitter_ms: jitter,
  }));
  socket.onclose = () => process.exit(0);
  socket.close();
}
