import { client } from "../graphql_sse.js";
import { runWith } from "./iterating.js";

await runWith(client);
