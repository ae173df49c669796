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

/** Returns the tab to show first: the active one of the last visit, or the first of ours. GraphiQL
 * opens the tab of that text; without a text, it shows the first tab without its variables, and on
 * the next visit an empty one. */
function shownTab(): { query: string | null; variables: string | null } {
  try {
    const kept = JSON.parse(localStorage.getItem("graphiql:tabState") ?? "") as {
      activeTabIndex: number;
      tabs: typeof TABS;
    };
    return kept.tabs[kept.activeTabIndex] ?? TABS[0]!;
  } catch {
    return TABS[0]!;
  }
}

const shown = shownTab();

const page = document.getElementById("page");
if (page === null) throw new Error("index.html has no element with the id page");

createRoot(page).render(
  <GraphiQL
    fetcher={fetcher}
    defaultTabs={TABS}
    initialQuery={shown.query ?? ""}
    initialVariables={shown.variables ?? ""}
    customScalarSchemas={SCALARS}
    defaultEditorToolsVisibility="variables"
  >
    <GraphiQL.Logo>
      <Bar />
    </GraphiQL.Logo>
  </GraphiQL>,
);
