import "graphiql/setup-workers/vite";
import "graphiql/style.css";
import "./page.css";

import { GraphiQL } from "graphiql";
import { createRoot } from "react-dom/client";
import { Bar } from "./Bar";
import { fetcher } from "./fetcher";
import enqueue from "./tabs/enqueue.graphql?raw";
import enqueueVariables from "./tabs/enqueue.json?raw";
import follow from "./tabs/follow.graphql?raw";
import followVariables from "./tabs/follow.json?raw";
import policies from "./tabs/policies.graphql?raw";
import policiesVariables from "./tabs/policies.json?raw";

const TABS = [
  { query: enqueue, variables: enqueueVariables, headers: null },
  { query: policies, variables: policiesVariables, headers: null },
  { query: follow, variables: followVariables, headers: null },
];

// What the editor of variables takes for our own scalars; it takes strings for the others.
const SCALARS = {
  JSON: {},
  BigInt: { type: ["integer", "string"] as ("integer" | "string")[] },
};

// GraphiQL shows the first tab's own variables only once it is chosen. What a visitor wrote, and
// GraphiQL keeps under this key, goes first.
const variables = localStorage.getItem("graphiql:variables") ?? enqueueVariables;

const page = document.getElementById("page");
if (page === null) throw new Error("index.html has no element with the id page");

createRoot(page).render(
  <GraphiQL
    fetcher={fetcher}
    defaultTabs={TABS}
    initialVariables={variables}
    customScalarSchemas={SCALARS}
    defaultEditorToolsVisibility="variables"
  >
    <GraphiQL.Logo>
      <Bar />
    </GraphiQL.Logo>
  </GraphiQL>,
);
