import { execute } from "../execute.js";
import { runScenario } from "./scenario.js";

await runScenario({ query: execute, mutate: execute });
