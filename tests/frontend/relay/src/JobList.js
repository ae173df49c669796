// The documents of a list of jobs with pages in both directions, as Relay's compiler reads them.
const { graphql } = require("relay-runtime");

graphql`
  query JobListQuery($filter: JobFilter) {
    ...JobList_query @arguments(filter: $filter, first: 2)
  }
`;

graphql`
  fragment JobList_query on Query
  @argumentDefinitions(
    filter: { type: "JobFilter" }
    first: { type: "Int" }
    after: { type: "String" }
    last: { type: "Int" }
    before: { type: "String" }
  )
  @refetchable(queryName: "JobListPageQuery") {
    jobs(filter: $filter, first: $first, after: $after, last: $last, before: $before)
      @connection(key: "JobList_jobs", filters: ["filter"]) {
      totalCount
      totalCountIsEstimate
      edges {
        node {
          ...JobList_job
        }
      }
    }
  }
`;

graphql`
  fragment JobList_job on Job @refetchable(queryName: "JobListJobQuery") {
    status
    payload
  }
`;
