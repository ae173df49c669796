// Reads the jobs of a server with Relay's runtime: node main.js URL
const {
  ConnectionHandler,
  Environment,
  Network,
  RecordSource,
  Store,
  createOperationDescriptor,
  fetchQuery,
} = require("relay-runtime");
const first = require("./src/__generated__/JobListQuery.graphql");
const page = require("./src/__generated__/JobListPageQuery.graphql");
const refetch = require("./src/__generated__/JobListJobQuery.graphql");

const network = Network.create(async ({ text }, variables) => {
  const response = await fetch(process.argv[2], {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ query: text, variables }),
  });
  return response.json();
});
const environment = new Environment({ network, store: new Store(new RecordSource()) });
const filter = { types: ["payout.execute"] };

/** Sends a query, keeps what it reads, and returns the ids of the list and its position. */
async function read(query, variables) {
  environment.retain(createOperationDescriptor(query, { filter, ...variables }));
  await fetchQuery(environment, query, { filter, ...variables }).toPromise();
  let found;
  environment.commitUpdate((store) => {
    const jobs = ConnectionHandler.getConnection(store.getRoot(), "JobList_jobs", { filter });
    const info = jobs.getLinkedRecord("pageInfo");
    found = {
      keys: jobs
        .getLinkedRecords("edges")
        .map((edge) => edge.getLinkedRecord("node").getValue("payload").batchId),
      ids: jobs.getLinkedRecords("edges").map((edge) => edge.getLinkedRecord("node").getDataID()),
      total: [jobs.getValue("totalCount"), jobs.getValue("totalCountIsEstimate")],
      start: info.getValue("startCursor"),
      end: info.getValue("endCursor"),
      next: info.getValue("hasNextPage"),
      previous: info.getValue("hasPreviousPage"),
    };
  });
  return found;
}

const show = ({ keys, total, next, previous }) =>
  console.log(JSON.stringify({ keys, total, next, previous }));

(async () => {
  let list = await read(first, {});
  show(list);
  list = await read(page, { first: 2, after: list.end });
  show(list);
  list = await read(page, { first: 2, after: list.end });
  show(list);
  const [id] = list.ids;
  const { node } = await fetchQuery(environment, refetch, { id }).toPromise();
  console.log(JSON.stringify({ refetched: node?.__id === id }));
  // Another list, read from its end.
  filter.statuses = ["QUEUED"];
  list = await read(page, { last: 2 });
  show(list);
  list = await read(page, { last: 2, before: list.start });
  show(list);
})();
