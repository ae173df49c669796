import { client } from "../graphql_ws.js";
import { runWith } from "./iterating.js";

await runWith(client);
