// A remote worker of payout.execute that knows nothing but GraphQL over HTTP: node worker.mjs URL
const url = process.argv[2];

async function graphql(query, variables) {
  const response = await fetch(url, {
    method: 'POST',
    headers: { 'content-type': 'application/json', accept: 'application/json' },
    body: JSON.stringify({ query, variables }),
  });
  const { data, errors } = await response.json();
  if (errors) throw new Error(JSON.stringify(errors));
  return data;
}

const LEASE = `mutation ($input: LeaseJobsInput!) { leaseJobs(input: $input) {
  __typename
  ... on LeaseJobsSuccess { leases { leaseToken job { id attempt payload } } } } }`;
const HEARTBEAT = `mutation ($token: String!, $progress: JSON) {
  heartbeatJob(leaseToken: $token, progress: $progress) {
    __typename ... on HeartbeatJobSuccess { cancelRequested secondsLeft } } }`;
const COMPLETE = `mutation ($token: String!, $result: JSON) {
  completeJob(leaseToken: $token, result: $result) { __typename ... on JobChanged { job { status } } } }`;
const FAIL = `mutation ($token: String!, $error: JobErrorInput!) {
  failJob(leaseToken: $token, error: $error, retryAfterSeconds: 0) {
    __typename ... on JobChanged { job { status } } } }`;

const input = { jobTypes: ['payout.execute'], workerId: `node:${process.pid}`, limit: 10, waitSeconds: 1 };
for (let idle = 0; idle < 2; ) {
  const { leaseJobs } = await graphql(LEASE, { input });
  idle = leaseJobs.leases.length ? 0 : idle + 1;
  for (const { leaseToken: token, job } of leaseJobs.leases) {
    const beat = await graphql(HEARTBEAT, { token, progress: { paying: job.payload.batchId } });
    if (beat.heartbeatJob.__typename !== 'HeartbeatJobSuccess') continue;
    if (job.payload.batchId === 'shaky' && job.attempt === 1) {
      await graphql(FAIL, { token, error: { code: 'bank_closed', message: 'The bank is closed.' } });
    } else {
      const result = { paid: job.payload.batchId, attempt: job.attempt };
      await graphql(COMPLETE, { token, result });
      await graphql(COMPLETE, { token, result });
    }
  }
}
