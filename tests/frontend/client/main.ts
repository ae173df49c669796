import { enqueueInEveryWay } from "./enqueue.js";
import { cancelAndFollow, countByPages, policies } from "./jobs.js";
import { sendTo } from "./send.js";

const url = process.argv[2];
if (url === undefined) throw new Error("usage: main.js URL");
const send = sendTo(url);
const told = {
  policies: await policies(send),
  enqueued: await enqueueInEveryWay(send),
  queued: await countByPages(send),
  followed: await cancelAndFollow(send, url),
};
console.log(JSON.stringify(told));
